"""`meshift ppo`: four roles, prompts and rewards brought to the graph of `algorithms/ppo.py`.

It knows nothing of the objective itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meshift.algorithms.ppo import PPO
from meshift.config.runs import PPORunConfig
from meshift.models.hf.save import save_model
from meshift.runtime.models import compute_dtype, open_model
from meshift.runtime.observer import Observer
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
from meshift.runtime.run import Job, RunResult, run_job

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_ppo(config: PPORunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return run_job(config, build_ppo_job, observer)


def check_ppo(config: PPORunConfig) -> list[tuple[str, str]]:
    """Validate data, models and reward functions and say what the run would do, without training."""
    return describe(config, _check(config))


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


def _check(config: PPORunConfig) -> Checked:
    return check_inputs(config, role_models(config), {"actor": config.actor, "critic": config.critic})


def build_ppo_job(config: PPORunConfig) -> Job:
    """Roles, prompts, rewards and graph."""
    checked = _check(config)
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


def _roles(config: PPORunConfig, checked: Checked) -> dict[str, LocalRole]:
    roles = open_roles(config, checked)
    model = open_model(checked.names["critic"], "value", compute_dtype(config.dtype))
    if config.critic.new_value_head:
        model.head.load_state_dict({"weight": torch.zeros(1, model.config.hidden_size)})
    return roles | {"critic": open_trained(checked, "critic", model, seed=config.seed + 1)}


def _save(roles: Mapping[str, LocalRole], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_model(roles["actor"].model, folder, tokenizer=tokenizer)
    save_model(roles["critic"].model, folder.with_name("final_critic"), tokenizer=tokenizer)
