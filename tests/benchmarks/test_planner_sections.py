"""The planner's benchmark plans what it says it plans."""

import pytest

from benchmarks.planner import LLAMA, find, llama, of_actor, ppo
from meshift.models.shards import num_parameters, shard_table
from meshift.planner.candidates import Problem
from meshift.planner.hardware import KNOWN


@pytest.mark.parametrize(("name", "billions"), [("7b", 6.7), ("13b", 13.0), ("34b", 33.7), ("70b", 69.0)])
def test_models_have_the_sizes_of_their_names(name, billions):
    assert num_parameters(shard_table(llama(name), "lm")) / 1e9 == pytest.approx(billions, rel=0.02)
    assert name in LLAMA


def test_grpo_is_ppo_without_what_belongs_to_the_critic():
    step = of_actor("1b", 64, 128)
    assert [call.name for call in step.calls] == ["rollout", "reference", "train_actor"]
    assert set(step.roles) == {"actor", "reference"}
    assert all(call.waits <= {"rollout", "reference"} for call in step.calls)


def test_a_plan_and_its_bound_come_within_the_time_that_they_have():
    problem = Problem(ppo("1b", "1b", 64, 128), KNOWN["a100"], 4)
    proof, local, taken = find(problem, 4.0)
    assert proof.bound <= proof.seconds <= local
    assert taken < 12
