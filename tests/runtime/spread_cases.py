"""Runs of every method by plans of three processes, and how each is started."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from safetensors.torch import load_file

from meshift.config.policy_runs import OnlineDPORunConfig, RAFTRunConfig
from meshift.config.runs import (
    DPORunConfig,
    KTORunConfig,
    ORPORunConfig,
    PPORunConfig,
    RewardRunConfig,
    SFTRunConfig,
    SimPORunConfig,
)
from meshift.runtime.dpo_run import run_dpo
from meshift.runtime.kto_run import run_kto
from meshift.runtime.observer import SilentObserver
from meshift.runtime.pair_run import run_pairs
from meshift.runtime.policy_run import METHODS, run_policy
from meshift.runtime.ppo_run import run_ppo
from meshift.runtime.reward_run import run_reward
from meshift.runtime.sft_run import run_sft

SMOOTH = {"learning_rate": 0.01, "adam_epsilon": 1e-3}  # Adam magnifies the rounding of a tiny gradient
MOVING = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2}
DECOUPLED = {"recompute_logprobs": True, "importance_correction": "token"}
ADAPTED = {"lora": {"rank": 3, "alpha": 6}}
MERGED = {"lora": {**ADAPTED["lora"], "save_merged": True}}
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
    "grpo-ahead": Case(  # process 1 draws while the others train
        POLICY["grpo"],
        APART,
        {
            "max_staleness": 1,
            "reference": MOVING,
            "grpo": {"num_mini_batches": 2, **DECOUPLED},
        },
    ),
    "dapo-ahead": Case(  # a device draws and trains, in rounds
        POLICY["dapo"],
        {"actor": placed(generate="d2@1-2", train="t2@0,1"), "reward": placed(infer="d1@2")},
        {"max_staleness": 2, "dapo": {"num_mini_batches": 2, **DECOUPLED}},
    ),
    "remax-ahead": Case(  # process 0 draws, and runs host calls between
        POLICY["remax"],
        {"actor": placed(generate="d1@0", train="t2@1-2"), "reference": placed(infer="d1@0")},
        {"max_staleness": 1},
    ),
    "ppo-ahead": Case(
        PPORunConfig,
        {
            "actor": placed(generate="d1@1", train="t2@0,2"),
            "critic": placed(infer="d1@0", train="d1@2"),
            "reference": placed(infer="d1@1"),
        },
        {"max_staleness": 1, "ppo": {"num_mini_batches": 2, "missing_eos_penalty": 0.5, **DECOUPLED}},
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
    "cispo": Case(POLICY["cispo"], {"actor": placed(generate="d1@0", train="p2@2,1")}),
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
    "online_dpo": Case(
        OnlineDPORunConfig,
        {"actor": placed(generate="d2@1-2", train="t2@0-1"), "reference": placed(infer="d1@2")},
        {
            "generation": {"num_generations": 3},
            "reference": MOVING,
            "online_dpo": {"pairs": "all", "labels": "soft"},
        },
    ),
    "raft": Case(
        RAFTRunConfig,
        {"actor": placed(generate="d1@1", train="d2@1,2"), "reference": placed(infer="d1@2")},
        {"raft": {"kl_coef": 0.1, "num_mini_batches": 2}, "reference": MOVING},
    ),
    "ppo-cost": Case(
        PPORunConfig,
        {
            "actor": placed(generate="d1@1", train="t2@0,2"),
            "critic": placed(train="d1@2"),
            "cost": placed(infer="t2@1-2"),
            "cost_critic": placed(infer="d1@0", train="d2@0-1"),
            "reference": placed(infer="d1@2"),
        },
        {"ppo": {"num_mini_batches": 2, "missing_eos_penalty": 0.5}, "reward": {"per_token": True, "weight": 0.3}},
    ),
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
    "kto": Case(
        KTORunConfig,
        {"actor": placed(infer="d2@1-2", train="t2@0-1"), "reference": placed(infer="d1@2")},
        {"eval_steps": 1, "reference": MOVING},
    ),
    "orpo": Case(ORPORunConfig, {"actor": placed(infer="t2@0,2", train="d2@1-2")}, {"eval_steps": 2}),
    "sft": Case(SFTRunConfig, {"actor": placed(infer="t2@0,2", train="d3@2,1,0")}, {"eval_steps": 1}),
    "grpo-lora": Case(
        POLICY["grpo"],
        APART,
        {"actor": ADAPTED, "grpo": {"num_mini_batches": 2, "kl_coef": 0.1}, "reference": MOVING},
    ),
    "dpo-lora": Case(
        DPORunConfig, {"actor": placed(train="p2@1-2"), "reference": placed(infer="d1@0")}, {"actor": MERGED}
    ),
    "reward-lora": Case(RewardRunConfig, {"reward": placed(infer="d1@0", train="d2s@1-2")}, {"model": ADAPTED}),
    "reward": Case(RewardRunConfig, {"reward": placed(train="p2@1-2")}, {"eval_steps": 2}),
}
RUNS = {
    PPORunConfig: run_ppo,
    DPORunConfig: run_dpo,
    KTORunConfig: run_kto,
    ORPORunConfig: run_pairs,
    SimPORunConfig: run_pairs,
    SFTRunConfig: run_sft,
    RewardRunConfig: run_reward,
}


def run(config, observer=None):
    return RUNS.get(type(config), run_policy)(config, observer or SilentObserver())


def check_weights(one, other):
    """Every tensor of two runs' models, or of their adapters, within 1e-5 of its norm."""
    ours, theirs = (load_file(next((folder / "final").glob("*model.safetensors"))) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert float((ours[name] - expected).norm() / expected.norm()) < 1e-5, name


def data_of(both):
    return dict(zip(("dataset_name", "eval_dataset_name"), both, strict=True))
