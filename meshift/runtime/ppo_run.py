"""`meshift ppo`: four roles, prompts and rewards brought to the graph of `algorithms/ppo.py`.

It knows nothing of the objective itself, nor of how many processes run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshift.algorithms.ppo import PPO
from meshift.config.runs import PPORunConfig
from meshift.runtime.observer import Observer
from meshift.runtime.planned_run import Method, plan_row, start_run
from meshift.runtime.plans import Uses, uses_of
from meshift.runtime.role_spec import LocalOpener, Opener, save_role
from meshift.runtime.rollout_prompts import PromptSource
from meshift.runtime.rollout_run import (
    Checked,
    check_inputs,
    describe,
    rollout_job,
    rollout_specs,
    run_sampling,
    sketched_sampling,
)
from meshift.runtime.run import Job, RunResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_ppo(config: PPORunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return start_run(config, PPO_METHOD, observer)


def check_ppo(config: PPORunConfig) -> list[tuple[str, str]]:
    """Validate data, models and reward functions and say what the run would do, without training."""
    return [*describe(config, _check(config)), *plan_row(config, PPO_METHOD)]


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
    """Data, models and reward functions, found right."""
    return check_inputs(config, role_models(config), {"actor": config.actor, "critic": config.critic})


def build_ppo_job(config: PPORunConfig, opener: Opener | None = None) -> Job:
    """Roles, prompts, rewards and graph. Without an opener the roles are in this process."""
    opener = opener or LocalOpener(None, config.plan.offloaded)
    checked = _check(config)
    algorithm = PPO(config, run_sampling(config, checked))
    graph = algorithm.graph(checked.reward_functions(), checked.reward_keys)
    specs = rollout_specs(config, checked)
    specs["critic"] = replace(specs["critic"], seed=config.seed + 1, zero_head=config.critic.new_value_head)
    roles = {name: opener.open(spec) for name, spec in specs.items()}
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


def ppo_uses(config: PPORunConfig) -> Uses:
    """The calls of each role."""
    sampling, functions = sketched_sampling(config)
    return uses_of(PPO(config, sampling).graph(functions))


PPO_METHOD = Method(build=build_ppo_job, uses=ppo_uses, models=role_models)


def _save(roles: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_role(roles["actor"], folder, tokenizer)
    save_role(roles["critic"], folder.with_name("final_critic"), tokenizer)
