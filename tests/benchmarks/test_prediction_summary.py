"""What is said of predictions follows from pairs of seconds that can be counted by hand."""

import pytest

from benchmarks.prediction import CASES, config_of, summary
from meshift.runtime.plans import placements_of
from meshift.runtime.ppo_run import PPO_METHOD


def row(**calls):
    return {
        "calls": {name: {"predicted_s": a, "measured_s": b, "error": a / b - 1} for name, (a, b) in calls.items()}
    }


def test_errors_are_of_steps_and_of_calls_apart_and_the_order_of_pairs_is_counted():
    rows = [
        row(rollout=(1.0, 2.0), step=(1.1, 1.0)),
        row(rollout=(3.0, 2.0), step=(1.8, 2.0)),
        row(rollout=(2.0, 2.0), step=(1.6, 4.0)),
    ]
    found = summary(rows)
    assert found["step_median_error"] == pytest.approx(0.1)
    assert found["step_worst_error"] == pytest.approx(0.6)
    assert found["call_median_error"] == pytest.approx(0.5)
    # Foretold: first, third, second; measured: first, second, third.
    assert (found["pairs_in_order"], found["pairs"]) == (2, 3)
    assert found["kendall_tau"] == pytest.approx(1 / 3)


def test_the_placements_are_plans_of_the_recipe_over_one_two_and_four_processes():
    sizes = {}
    for name, case in CASES.items():
        config = config_of(case)
        assert all((role.lora is not None) == ("LoRA" in name) for role in (config.actor, config.critic))
        placements = placements_of(config.plan, PPO_METHOD.uses(config))
        devices = {d for kinds in placements.values() for one in kinds.values() for d in one.mesh.devices}
        sizes.setdefault(len(devices), []).append(name)
    assert set(sizes) == {1, 2, 4}
    assert len(sizes[2]) + len(sizes[4]) >= 6
