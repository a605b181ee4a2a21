"""`meshift ppo`: four roles, prompts and rewards brought to the graph of `algorithms/ppo.py`.

It knows nothing of the objective itself, nor of how many processes run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshift.algorithms.ppo import PPO
from meshift.batch import Outcome
from meshift.config.runs import PPORunConfig
from meshift.config.sections import TrainableConfig
from meshift.runtime.observer import Observer
from meshift.runtime.planned_run import Method, plan_row, start_run
from meshift.runtime.plans import Uses, uses_of
from meshift.runtime.role_spec import LocalOpener, Opener, save_role
from meshift.runtime.rollout_prompts import PromptSource, load_rows
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
    names = {"actor": actor}
    if not config.ppo.shared_trunk:
        names["critic"] = config.critic.model_name_or_path or reward or actor
    names["reference"] = config.reference.model_name_or_path or actor
    names |= {"reward": reward} if reward is not None else {}
    return names | _cost_models(config, reward or actor)


def _cost_models(config: PPORunConfig, otherwise: str) -> dict[str, str]:
    """Of the roles that a cost adds: its critic starts from its model, where there is one."""
    if not config.cost.is_given:
        return {}
    cost = config.cost.model_name_or_path
    names = {"cost_critic": config.cost_critic.model_name_or_path or cost or otherwise}
    return names | ({"cost": cost} if cost is not None else {})


def ppo_trained(config: PPORunConfig) -> dict[str, TrainableConfig]:
    """How the roles that learn are trained."""
    trained: dict[str, TrainableConfig] = {"actor": config.actor}
    trained |= {} if config.ppo.shared_trunk else {"critic": config.critic}
    return trained | ({"cost_critic": config.cost_critic} if config.cost.is_given else {})


def _check(config: PPORunConfig) -> Checked:
    """Data, models and reward functions, found right."""
    return check_inputs(config, role_models(config), ppo_trained(config))


def build_ppo_job(config: PPORunConfig, opener: Opener | None = None) -> Job:
    """Roles, prompts, rewards and graph. Without an opener the roles are in this process."""
    opener = opener or LocalOpener(None, config.plan.offloaded)
    checked = _check(config)
    algorithm = PPO(config, run_sampling(config, checked))
    graph = algorithm.graph(checked.reward_functions(), checked.reward_keys, checked.cost_functions())
    specs = rollout_specs(config, checked)
    critics = {"critic": config.critic, "cost_critic": config.cost_critic}
    for number, (name, critic) in enumerate(critics.items(), start=1):
        if name in specs:
            specs[name] = replace(specs[name], seed=config.seed + number, zero_head=critic.new_value_head)
    specs["actor"] = replace(specs["actor"], value_head=config.ppo.shared_trunk)
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
    costs = (lambda batch: Outcome()) if config.cost.functions else None
    return uses_of(PPO(config, sampling).graph(functions, cost_functions=costs))


PPO_METHOD = Method(build=build_ppo_job, uses=ppo_uses, models=role_models, rows=load_rows)


def _save(roles: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_role(roles["actor"], folder, tokenizer)
    critic = folder.with_name("final_critic")
    if "critic" in roles:
        save_role(roles["critic"], critic, tokenizer)
    else:
        save_role(roles["actor"], critic, tokenizer, "value")
    if "cost_critic" in roles:
        save_role(roles["cost_critic"], folder.with_name("final_cost_critic"), tokenizer)
