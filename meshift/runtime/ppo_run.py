"""`meshift ppo`: four roles, prompts and rewards brought to the graph of `algorithms/ppo.py`.

It knows nothing of the objective itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meshift.algorithms.ppo import PPO
from meshift.config.runs import PPORunConfig
from meshift.models.hf.save import save_model
from meshift.runtime.launch.launcher import launch
from meshift.runtime.launch.restarts import run_with_restarts
from meshift.runtime.models import compute_dtype, open_model
from meshift.runtime.observer import Observer
from meshift.runtime.plans import mesh_of, num_processes, placements_of
from meshift.runtime.role import LocalRole
from meshift.runtime.rollout_prompts import PromptSource
from meshift.runtime.rollout_run import (
    Checked,
    check_inputs,
    describe,
    open_roles,
    open_trained,
    rollout_job,
    run_sampling,
)
from meshift.runtime.run import Job, RunResult, finished_run, run_job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


SHARE = "meshift.runtime.spread_ppo:run_share"


def run_ppo(config: PPORunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`.

    With a plan, in as many processes as it names devices.
    """
    if not config.plan.is_given:
        return run_job(config, build_ppo_job, observer)
    mesh = mesh_of(config, role_models(config))
    finished = finished_run(config, observer)
    if finished is not None:
        return finished

    def run(config: PPORunConfig, observer: Observer) -> Any:
        return launch(config, mesh, SHARE, observer)

    found = run_with_restarts(config, config.launch.max_restarts, run, observer)
    folders = {key: Path(found[key]) for key in ("output_dir", "final_dir")}
    return RunResult(**folders, metrics=found["metrics"])


def check_ppo(config: PPORunConfig) -> list[tuple[str, str]]:
    """Validate data, models and reward functions and say what the run would do, without training."""
    rows = describe(config, check_ppo_inputs(config))
    return [*rows, ("plan", _plan_text(config))] if config.plan.is_given else rows


def role_models(config: PPORunConfig) -> dict[str, str]:
    """The model that each role starts from: the reference from the actor, the critic from the reward model."""
    actor = str(config.actor.model_name_or_path)
    reward = config.reward.model_name_or_path
    names = {
        "actor": actor,
        "critic": config.critic.model_name_or_path or reward or actor,
        "reference": config.reference.model_name_or_path or actor,
    }
    return names | ({"reward": reward} if reward is not None else {})


def check_ppo_inputs(config: PPORunConfig) -> Checked:
    """Data, models and reward functions, found right."""
    return check_inputs(config, role_models(config), {"actor": config.actor, "critic": config.critic})


def build_ppo_job(config: PPORunConfig) -> Job:
    """Roles, prompts, rewards and graph."""
    checked = check_ppo_inputs(config)
    algorithm = PPO(config, run_sampling(config, checked))
    graph = algorithm.graph(checked.reward_functions(), checked.reward_keys)
    roles = _roles(config, checked)
    return rollout_job(
        config,
        checked,
        PromptSource(config, checked.data.prompts, checked.columns),
        title="PPO",
        graph=graph,
        roles=roles,
        save=lambda folder: _save(roles, checked.tokenizer, folder),
        memories={"ppo": algorithm},
    )


def _plan_text(config: PPORunConfig) -> str:
    """Every call's placement, and how many processes that makes."""
    placements = placements_of(config, role_models(config))
    calls = [f"{role}.{kind} {p}" for role, kinds in placements.items() for kind, p in kinds.items()]
    return f"{num_processes(placements)} processes: {', '.join(calls)}"


def _roles(config: PPORunConfig, checked: Checked) -> dict[str, LocalRole]:
    roles = open_roles(config, checked)
    model = open_model(checked.names["critic"], "value", compute_dtype(config.dtype))
    if config.critic.new_value_head:
        model.head.load_state_dict({"weight": torch.zeros(1, model.config.hidden_size)})
    return roles | {"critic": open_trained(checked, "critic", model, seed=config.seed + 1)}


def _save(roles: Mapping[str, LocalRole], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_model(roles["actor"].model, folder, tokenizer=tokenizer)
    save_model(roles["critic"].model, folder.with_name("final_critic"), tokenizer=tokenizer)
