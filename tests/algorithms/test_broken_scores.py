"""A model that gives a completion no number stops the step, with the sample's name, before anything is learned."""

import math

import pytest
import torch
from tiny_policy import host_call, policy_config, scored_batch
from tiny_rl import make_world, ppo_config, tiny_model

from meshift.algorithms.kto import kl_term
from meshift.algorithms.policy_graph import Drawing
from meshift.algorithms.rollouts import total_score
from meshift.batch import WHERE, Batch, Outcome, Ragged
from meshift.config.loading import make_config
from meshift.config.sections import TrainableConfig
from meshift.errors import NonFiniteError
from meshift.runtime.policy_run import CRITIC_FREE
from meshift.runtime.role import LocalRole
from meshift.runtime.rollout_run import sampling_task
from meshift.step import run_step

BROKEN = 5
NAMED = rf"in 1 of \d+ completions \(sample {BROKEN}, data\.jsonl:2\)"


class Broken:
    """A reward or cost model that gives one completion of a step this value, and every other its number."""

    def __init__(self, value):
        self.value = value

    def infer(self, task, batch):
        scores = torch.arange(float(len(batch)))
        scores[BROKEN] = self.value
        if task.key != "process_scores":
            return Outcome(batch=Batch({task.key: Ragged.scalars(scores)}))
        lengths = batch["completion_lengths"].values
        return Outcome(batch=Batch({task.key: Ragged(scores.repeat_interleave(lengths), lengths)}))


def prompts(num_prompts, num_generations):
    rows = [[1 + i] for i in range(num_prompts) for _ in range(num_generations)]
    fields = {
        "prompts": Ragged.from_rows(rows, torch.int64),
        "index": Ragged.scalars(list(range(len(rows))), torch.int64),
    }
    where = [f"data.jsonl:{row[0]}" for row in rows]
    return Batch(fields, {WHERE: where})


def actor_of(config):
    role = LocalRole("actor", tiny_model(), config.actor, trainable=True)
    return role.can_generate(64, str)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("schema", CRITIC_FREE)
def test_a_score_that_is_no_number_would_be_learned_from(schema, value):
    config = make_config(
        schema,
        {
            "output_dir": "unused",
            "data": {"dataset_name": "unused", "batch_size": 2},
            "actor": {"model_name_or_path": "unused"},
            "reward": {"model_name_or_path": "unused"},
            "generation": {"num_generations": 1 if schema.SECTION == "remax" else 4, "max_completion_length": 3},
        },
    )
    num_prompts = 8 // config.generation.num_generations
    batch = prompts(num_prompts, config.generation.num_generations)
    drawing = Drawing(sampling=sampling_task(config, ()), columns=(WHERE,))
    roles = {"actor": actor_of(config), "reward": Broken(value)}
    if config.has_reference:
        roles["reference"] = LocalRole("reference", tiny_model(), TrainableConfig())
    named = NAMED.replace("jsonl:2", "jsonl:6") if num_prompts == 8 else NAMED
    with pytest.raises(NonFiniteError, match=rf"the reward model's score is {value} {named}"):
        run_step(CRITIC_FREE[schema][1](config, drawing), roles, batch, 0)
    assert roles["actor"].version == 0


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    ("which", "what"),
    [
        ("reward", "the reward model's score"),
        ("process", "the reward model's scores per token"),
        ("cost", "the cost model's score"),
    ],
)
def test_ppo_would_learn_from_a_score_or_cost_that_is_no_number(which, what, value):
    sections = {"reward": {"model_name_or_path": "unused", "per_token": which == "process"}}
    sections |= {"cost": {"model_name_or_path": "unused", "limit": 0.0}} if which == "cost" else {}
    config = ppo_config(generation={"max_completion_length": 3}, **sections)
    unused = dict.fromkeys(("reward", *sections.keys() & {"cost"}), lambda completion_ids: [0.0])
    world = make_world(config=config, **unused)
    roles = {**world.roles, "reward": Broken(0.0 if which == "cost" else value), "cost": Broken(value)}
    before = world.algorithm.state_dict()
    with pytest.raises(NonFiniteError, match=rf"{what}.* is .*{NAMED}"):
        run_step(world.algorithm.graph(None, (WHERE,)), roles, prompts(2, 4), 0)
    assert roles["actor"].version == roles["critic"].version == 0
    if which != "cost":
        assert world.algorithm.state_dict() == before, "what PPO remembers is of the last good step"


def test_functions_may_leave_a_completion_out_but_their_sum_may_not_run_over():
    """NaN is how a batch says that no function scored a row; a weight can make a finite number infinite."""
    scores = torch.tensor([1.0, math.nan, 2.0])
    total, judged = total_score(Batch({"function_scores": Ragged.scalars(scores)}), 1.0)
    assert (total.tolist(), judged.tolist()) == ([1.0, 0.0, 2.0], [True, False, True])
    scores[2] = -math.inf
    with pytest.raises(
        NonFiniteError, match=r"the reward functions' weighted score is -inf in 1 of 3 .*sample 2\)"
    ):
        total_score(Batch({"function_scores": Ragged.scalars(scores)}), 1.0)
    with pytest.raises(NonFiniteError, match="the reward model's score is inf"):
        total_score(Batch({"model_scores": Ragged.scalars(torch.tensor([3e38]))}), 10.0)


@pytest.mark.parametrize("method", ["rloo", "remax", "reinforce_pp"])
def test_kl_that_is_no_number_would_leave_a_group_without_advantages(method):
    batch = scored_batch((1.0, 0.0, 2.0, 3.0), drift=0.5, baseline=[0.0] * 4, baseline_judged=[True] * 4)
    batch["ref_logprobs"].values[2] = math.nan
    batch = Batch(batch.fields, {WHERE: [f"a:{i}" for i in range(4)]})
    with pytest.raises(
        NonFiniteError, match=r"KL to the reference is nan in 1 of 4 completions \(sample 1, a:1\)"
    ):
        host_call(policy_config(method, **{method: {"kl_coef": 0.1}}))(batch)


def test_the_kl_term_of_kto_would_be_zero_for_log_probs_that_are_no_numbers():
    fields = {
        "mismatched_logps": Ragged.scalars(torch.tensor([1.0, math.nan])),
        "ref_mismatched_logps": Ragged.scalars(torch.tensor([0.0, 0.0])),
    }
    with pytest.raises(NonFiniteError, match=r"of the mismatched completions .*\(sample 1, b\)"):
        kl_term(Batch(fields, {WHERE: ["a", "b"]}))
