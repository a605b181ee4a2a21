"""`meshift grpo` and the other methods without a critic: actor, prompts and rewards brought to a method's graph.

It knows nothing of the objectives themselves, nor of how many processes run them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from meshift.algorithms.cispo import cispo_graph
from meshift.algorithms.dapo import dapo_graph
from meshift.algorithms.dr_grpo import dr_grpo_graph
from meshift.algorithms.grpo import grpo_graph
from meshift.algorithms.gspo import gspo_graph
from meshift.algorithms.online_dpo import online_dpo_graph
from meshift.algorithms.policy_graph import Drawing
from meshift.algorithms.raft import raft_graph
from meshift.algorithms.reinforce_pp import reinforce_pp_graph
from meshift.algorithms.remax import remax_graph
from meshift.algorithms.rloo import rloo_graph
from meshift.config.policy_runs import (
    CISPORunConfig,
    CriticFreeRunConfig,
    DAPORunConfig,
    DrGRPORunConfig,
    GRPORunConfig,
    GSPORunConfig,
    OnlineDPORunConfig,
    RAFTRunConfig,
    ReinforcePPRunConfig,
    ReMaxRunConfig,
    RLOORunConfig,
)
from meshift.graph.calls import Graph
from meshift.runtime.observer import Observer
from meshift.runtime.planned_run import Method, plan_row, start_run
from meshift.runtime.plans import Uses, uses_of
from meshift.runtime.role_spec import LocalOpener, Opener, save_role
from meshift.runtime.rollout_prompts import FurtherPrompts, PromptSource, load_rows
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

GraphMaker = Callable[[Any, Drawing], Graph]
METHODS: Mapping[type[CriticFreeRunConfig], tuple[str, GraphMaker]] = MappingProxyType(
    {
        GRPORunConfig: ("GRPO", grpo_graph),
        DrGRPORunConfig: ("Dr. GRPO", dr_grpo_graph),
        DAPORunConfig: ("DAPO", dapo_graph),
        GSPORunConfig: ("GSPO", gspo_graph),
        CISPORunConfig: ("CISPO", cispo_graph),
        RLOORunConfig: ("RLOO", rloo_graph),
        ReinforcePPRunConfig: ("REINFORCE++", reinforce_pp_graph),
        ReMaxRunConfig: ("ReMax", remax_graph),
    }
)
"""Those that move the policy by advantages."""
CRITIC_FREE: Mapping[type[CriticFreeRunConfig], tuple[str, GraphMaker]] = MappingProxyType(
    {
        **METHODS,
        OnlineDPORunConfig: ("online DPO", online_dpo_graph),
        RAFTRunConfig: ("RAFT", raft_graph),
    }
)


def run_policy(config: CriticFreeRunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return start_run(config, POLICY_METHOD, observer)


def check_policy(config: CriticFreeRunConfig) -> list[tuple[str, str]]:
    """Validate data, models and reward functions and say what the run would do, without training."""
    return [*describe(config, _check(config)), *plan_row(config, POLICY_METHOD)]


def policy_models(config: CriticFreeRunConfig) -> dict[str, str]:
    """The model that each role starts from; the reference, where there is one, from the actor."""
    actor, reward = str(config.actor.model_name_or_path), config.reward.model_name_or_path
    names = {"actor": actor}
    if config.has_reference:
        names["reference"] = config.reference.model_name_or_path or actor
    return names | ({"reward": reward} if reward is not None else {})


def _check(config: CriticFreeRunConfig) -> Checked:
    return check_inputs(config, policy_models(config), {"actor": config.actor})


def build_policy_job(config: CriticFreeRunConfig, opener: Opener | None = None) -> Job:
    """Roles, prompts, rewards and graph. Without an opener the roles are in this process."""
    opener = opener or LocalOpener(None, config.plan.offloaded)
    checked = _check(config)
    title, make_graph = CRITIC_FREE[type(config)]
    source = PromptSource(config, checked.data.prompts, checked.columns)
    further = FurtherPrompts(source, config.seed)
    drawing = Drawing(
        sampling=run_sampling(config, checked),
        reward_functions=checked.reward_functions(),
        columns=checked.reward_keys,
        more_prompts=further,
    )
    graph = make_graph(config, drawing)
    roles = {name: opener.open(spec) for name, spec in rollout_specs(config, checked).items()}
    return rollout_job(
        config,
        checked,
        source,
        title=title,
        graph=graph,
        roles=roles,
        save=lambda folder: save_role(roles["actor"], folder, checked.tokenizer),
        memories={"prompts": further},
    )


def policy_uses(config: CriticFreeRunConfig) -> Uses:
    """The calls of each role."""
    sampling, functions = sketched_sampling(config)
    return uses_of(CRITIC_FREE[type(config)][1](config, Drawing(sampling=sampling, reward_functions=functions)))


POLICY_METHOD = Method(build=build_policy_job, uses=policy_uses, models=policy_models, rows=load_rows)
