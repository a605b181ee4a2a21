"""Configs of the steps that are timed, as a user would write them, and the jobs that Meshift makes of them.

Everything that the methods share stands in `trained`; it knows nothing of timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from benchmarks.sizes import LEARNING_RATE, MAX_STEPS, NUM_GENERATIONS, PPO_EPOCHS, PPO_MINI_BATCHES
from meshift.config import runs
from meshift.runtime.dpo_run import build_dpo_job
from meshift.runtime.ppo_run import build_ppo_job
from meshift.runtime.reward_run import build_reward_job
from meshift.runtime.run import Job
from meshift.runtime.sft_run import build_sft_job

TOKENS_PER_MICRO_BATCH = 2048
Config = dict[str, Any]


def config_of(method: str, folder: Path, model: str, batch: int, max_new_tokens: int) -> Config:
    """The config of a step of `method`, for `batch` sequences (pairs in reward and dpo)."""
    shared: Config = {"output_dir": str(folder / "run"), "dtype": "bfloat16", "max_steps": MAX_STEPS}
    trained: Config = {
        "model_name_or_path": model,
        "learning_rate": LEARNING_RATE,
        "max_tokens_per_micro_batch": TOKENS_PER_MICRO_BATCH,
    }
    rows: Config = {"batch_size": batch, "shuffle": False}
    pairs = rows | {"dataset_name": str(folder / "pairs.jsonl"), "append_eos": False}
    match method:
        case "sft":
            data = rows | {"dataset_name": str(folder / "sft.jsonl"), "append_eos": False, "loss_on": "all"}
            return shared | {"data": data, "model": trained}
        case "reward":
            return shared | {"data": pairs, "model": trained}
        case "dpo":
            return shared | {"data": pairs, "actor": trained}
    prompts: Config = {"dataset_name": str(folder / "rl.jsonl"), "shuffle": False}
    generation = {"max_completion_length": max_new_tokens, "min_new_tokens": max_new_tokens, "num_slots": batch}
    run = shared | {"actor": trained, "data": prompts, "num_report_prompts": 0}
    reward_model = str(folder / "reward_model")
    if method == "ppo":
        ppo: Config = {
            "num_ppo_epochs": PPO_EPOCHS,
            "num_mini_batches": PPO_MINI_BATCHES,
            "length_limit_is_end": True,
        }
        # The stops are what a diverging run is for; here every update is to be made.
        ppo |= {"max_importance_ratio": 1e9}
        return run | {
            "data": prompts | {"batch_size": batch},
            "critic": {key: v for key, v in trained.items() if key != "model_name_or_path"},
            "reward": {"model_name_or_path": reward_model},
            "generation": generation,
            "ppo": ppo,
        }
    return run | {
        "data": prompts | {"batch_size": max(1, batch // NUM_GENERATIONS)},
        "reward": {"functions": [{"function": "benchmarks.variety:word_variety"}]},
        "generation": generation | {"num_generations": NUM_GENERATIONS},
        "grpo": {"kl_coef": 0.0},
    }


def build_job(method: str, config: Mapping[str, Any]) -> Job:
    """The job that `meshift <method>` would run with this config."""
    known: dict[str, tuple[type[BaseModel], Callable[[Any], Job]]] = {
        "sft": (runs.SFTRunConfig, build_sft_job),
        "reward": (runs.RewardRunConfig, build_reward_job),
        "dpo": (runs.DPORunConfig, build_dpo_job),
        "ppo": (runs.PPORunConfig, build_ppo_job),
    }
    config_type, build = known[method] if method in known else _grpo()
    return build(config_type.model_validate(dict(config)))


def _grpo() -> tuple[type[BaseModel], Callable[[Any], Job]]:
    return import_module("meshift.config.policy_runs").GRPORunConfig, partial(_build_policy_job)


def _build_policy_job(config: Any) -> Job:
    job: Job = import_module("meshift.runtime.policy_run").build_policy_job(config)
    return job
