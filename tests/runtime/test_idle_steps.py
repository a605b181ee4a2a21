"""A step that teaches nothing leaves the weights alone, in one process and in a plan of two."""

import json

import pytest
from gang import run_gang
from safetensors.torch import load_file
from spread_cases import SMOOTH, Case, placed, run

from meshift.config.policy_runs import GRPORunConfig, OnlineDPORunConfig
from meshift.runtime.observer import SilentObserver
from meshift.runtime.spread_run import run_share

FADING = """
steps = []

def differs_at_first(completion_ids, **columns):
    steps.append(1)
    return [float(i % 2) if len(steps) == 1 else 1.0 for i in range(len(completion_ids))]
"""
SCHEMAS = {"grpo": (GRPORunConfig, {"grpo": {"kl_coef": 0.0}}), "online_dpo": (OnlineDPORunConfig, {})}


def shares(rank, told):
    """One run after another, in this process of two."""
    for argument in told:
        run_share(argument, rank, 2, SilentObserver())


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_step_without_signal_would_move_the_weights(make_case, spread_files, tmp_path, read_lines, name):
    """Of two steps the second has no signal: the model is that of the first step, to the last bit."""
    schema, sections = SCHEMAS[name]

    def config(folder, max_steps, plan):
        rewards = tmp_path / f"{folder}.py"  # a module of its own for every run
        rewards.write_text(FADING, encoding="utf-8")
        of_run = {
            **sections,
            "max_steps": max_steps,
            "plan": plan,
            "actor": {"model_name_or_path": spread_files["actor"], "lr_scheduler_type": "constant", **SMOOTH},
            "reward": {"functions": [{"function": f"{rewards}:differs_at_first"}]},
        }
        return make_case(Case(schema, {}, {}), tmp_path / folder, **of_run)

    plan = {"actor": placed(generate="d1@1", train="d2@0-1")}
    by_plan = [config(f"plan-{n}", n, plan) for n in (1, 2)]
    told = [json.dumps({"run": type(c).__name__, "config": c.model_dump_json()}) for c in by_plan]
    run_gang(2, shares, tmp_path, told)
    for n in (1, 2):
        run(config(f"alone-{n}", n, {}))
    for kind in ("plan", "alone"):
        one, two = (load_file(tmp_path / f"{kind}-{n}" / "final" / "model.safetensors") for n in (1, 2))
        assert all((one[key] == two[key]).all() for key in one)
        rows = read_lines(tmp_path / f"{kind}-2" / "metrics.jsonl")
        assert [row["sync/version"] for row in rows] == [1, 1]
        skipped = [value for key, value in rows[1].items() if key.endswith("skipped_updates")]
        assert skipped == [1]
        assert not any(key.endswith("skipped_updates") for key in rows[0])
