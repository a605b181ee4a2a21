"""Every method by a plan of three processes writes what one process writes; some meet all that a plan may be."""

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from gang import run_gang
from safetensors.torch import load_file

from meshift.config.loading import make_config
from meshift.config.runs import DPORunConfig, RewardRunConfig, SFTRunConfig
from meshift.runtime.dpo_run import run_dpo
from meshift.runtime.observer import SilentObserver
from meshift.runtime.policy_run import METHODS, run_policy
from meshift.runtime.reward_run import run_reward
from meshift.runtime.sft_run import run_sft
from meshift.runtime.spread_run import run_share

SMOOTH = {"learning_rate": 0.01, "adam_epsilon": 1e-3}  # Adam magnifies the rounding of a tiny gradient
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
REWARDS = """
def odd(completion_ids, **columns):
    return [float(ids[0] % 2) for ids in completion_ids]
"""


def placed(**kinds):
    """`placed(train="t2@0-1")` -> a role of a plan."""
    split = {kind: text.split("@") for kind, text in kinds.items()}
    return {kind: {"layout": layout, "mesh": mesh} for kind, (layout, mesh) in split.items()}


class Case(NamedTuple):
    """A run: its config's class, its plan, and the sections that are not those of every case."""

    schema: type
    plan: dict[str, Any]
    sections: Mapping[str, Any] = MappingProxyType({})


POLICY = {schema.SECTION: schema for schema in METHODS}
APART = {"actor": placed(generate="d1@1", train="t2@0,2"), "reference": placed(infer="d1@2")}
CASES = {
    "grpo": Case(
        POLICY["grpo"],
        APART,
        {
            "reference": MOVING,
            "grpo": {"num_mini_batches": 2, "num_iterations": 2, "mask_truncated_completions": True},
        },
    ),
    "dr_grpo": Case(POLICY["dr_grpo"], {"actor": placed(train="d3@0-2"), "reward": placed(infer="t2@1-2")}),
    "dapo": Case(
        POLICY["dapo"],
        {"actor": placed(generate="d2@1-2", train="t2@0,1"), "reward": placed(infer="d1@2")},
        {"dapo": {"num_mini_batches": 2}},
    ),
    "dapo-apart": Case(
        POLICY["dapo"],
        {"actor": placed(generate="d1@1", train="d2@1,2"), "reward": placed(infer="d1@2")},
        {"dapo": {"num_mini_batches": 2, "kl_coef": 0.1}, "reference": MOVING},
    ),
    "gspo": Case(
        POLICY["gspo"],
        {"actor": placed(generate="d2@0-1", infer="d1@2", train="t2@1-2")},
        {"gspo": {"num_mini_batches": 2}},
    ),
    "cispo": Case(POLICY["cispo"], {"actor": placed(generate="d1@0", train="d1@2")}),
    "rloo": Case(
        POLICY["rloo"],
        {"actor": placed(generate="t2@1-2", infer="t2@0-1", train="d2@0-1"), "reference": placed(infer="d1@2")},
        {"rloo": {"num_mini_batches": 2}},
    ),
    "reinforce_pp": Case(POLICY["reinforce_pp"], APART),
    "remax": Case(
        POLICY["remax"],
        {"actor": placed(generate="d2@1-2", train="t2@1-2"), "reference": placed(infer="d1@0")},
    ),
    "remax-apart": Case(POLICY["remax"], {"actor": placed(train="d1@1"), "reward": placed(infer="d1@2")}),
    "dpo": Case(
        DPORunConfig,
        {"actor": placed(infer="d2@1-2", train="t2@0-1"), "reference": placed(infer="d1@2")},
        {"eval_steps": 1, "reference": MOVING},
    ),
    "dpo-read-once": Case(
        DPORunConfig,
        {"actor": placed(train="d2@1-2"), "reference": placed(infer="t2@0-1")},
        {"eval_steps": 2, "dpo": {"precompute_ref_log_probs": True, "loss_type": "ipo"}},
    ),
    "sft": Case(SFTRunConfig, {"actor": placed(infer="t2@0,2", train="d3@2,1,0")}, {"eval_steps": 1}),
    "reward": Case(RewardRunConfig, {"reward": placed(train="t2@1-2")}, {"eval_steps": 2}),
}
RUNS = {DPORunConfig: run_dpo, SFTRunConfig: run_sft, RewardRunConfig: run_reward}


def shares(rank, told):
    """Every case, one after another, in this process of three."""
    for argument in told:
        run_share(argument, rank, 3, SilentObserver())


def data_of(both):
    return dict(zip(("dataset_name", "eval_dataset_name"), both, strict=True))


@pytest.fixture(scope="module")
def files(make_folder, actor_folder, reward_folder, prompts_file, pairs_files, demonstrations_files):
    models = {"actor": actor_folder, "reward": reward_folder, "other": make_folder(seed=3)}
    return {
        **{name: str(folder) for name, folder in models.items()},
        "prompts": prompts_file,
        "pairs": pairs_files,
        "demonstrations": demonstrations_files,
    }


@pytest.fixture(scope="module")
def make_case(tmp_path_factory, files):
    rewards = tmp_path_factory.mktemp("rewards") / "odd.py"
    rewards.write_text(REWARDS, encoding="utf-8")
    model = {
        "model_name_or_path": files["actor"],
        "logits_chunk": 5,
        "max_tokens_per_micro_batch": 64,
        **SMOOTH,
    }
    other = {"model_name_or_path": files["other"]}
    held_out = {"batch_size": 6, "max_eval_samples": 7}
    pairs = {**data_of(files["pairs"]), **held_out}
    texts = data_of(files["demonstrations"])
    given = {
        # With the actor's own weights all margins of the first step are zero, and its accuracy is their rounding.
        DPORunConfig: {"actor": model, "data": pairs, "reference": other},
        RewardRunConfig: {"model": model, "data": pairs},
        SFTRunConfig: {"model": model, "data": texts | held_out},
    }
    drawn = {
        "data": {"dataset_name": files["prompts"], "batch_size": 4},
        "actor": model,
        "reward": {
            "model_name_or_path": files["reward"],
            "weight": 0.0,
            "functions": [{"function": f"{rewards}:odd"}],
        },
        "generation": {"max_completion_length": 5, "num_generations": 2, "top_k": 9},
        "num_report_prompts": 2,
    }

    def make(case, output_dir, **sections):
        values = {"output_dir": str(output_dir), "max_steps": 3, "dtype": "float32", "report_to": []}
        values |= given.get(case.schema, drawn)
        own = {key: values.get(key, {}) | value for key, value in case.sections.items() if isinstance(value, dict)}
        return make_config(case.schema, values | case.sections | own | sections)

    return make


@pytest.fixture(scope="module")
def spread(make_case, tmp_path_factory):
    """The folder of all runs by their plans, in one gang."""
    folder = tmp_path_factory.mktemp("spread")
    configs = {name: make_case(case, folder / name, plan=case.plan) for name, case in CASES.items()}
    told = [json.dumps({"run": type(c).__name__, "config": c.model_dump_json()}) for c in configs.values()]
    run_gang(3, shares, tmp_path_factory.mktemp("gang"), told)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_method_by_a_plan_would_write_something_else(spread, make_case, tmp_path, read_lines, name):
    case = CASES[name]
    alone = RUNS.get(case.schema, run_policy)(make_case(case, tmp_path / "run"), SilentObserver()).output_dir
    for file in ("metrics.jsonl", "samples.jsonl"):
        one, other = read_lines(spread / name / file), read_lines(alone / file)
        assert len(one) == len(other)
        for ours, theirs in zip(one, other, strict=True):
            kept = {key for key in theirs if not key.startswith(("timing_s/", "perf/"))}
            assert kept <= ours.keys()
            wrong = {key: (ours[key], theirs[key]) for key in kept if not is_close(ours[key], theirs[key])}
            assert not wrong, f"{file}: {wrong}"
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (spread / name, alone))
    assert ours.keys() == theirs.keys()
    for weight, expected in theirs.items():
        assert float((ours[weight] - expected).norm() / expected.norm()) < 1e-5, weight
    if name.startswith("dapo"):
        rounds = [row["sampling/num_rounds"] for row in read_lines(spread / name / "metrics.jsonl")]
        assert max(rounds) > 1, "further rounds must be drawn"


def is_close(ours, theirs):
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(ours, theirs, rel_tol=1e-4, abs_tol=1e-5) or (math.isnan(ours) and math.isnan(theirs))
    return ours == theirs
