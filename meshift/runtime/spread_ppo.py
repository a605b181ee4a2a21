"""`meshift ppo` by a plan: every process builds its share of the roles and goes through the same steps.

Process 0 runs host calls, writes the run's folder and is watched; the others follow it. It knows nothing of how
processes are started.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshift.algorithms.ppo import PPO
from meshift.config.runs import PPORunConfig
from meshift.config.sections import TrainableConfig
from meshift.layout.mesh import Device
from meshift.models.decoder import Decoder
from meshift.models.hf.save import save_model
from meshift.parallel.groups import Place
from meshift.runtime.models import compute_dtype, open_model
from meshift.runtime.observer import Observer
from meshift.runtime.plans import placements_of
from meshift.runtime.ppo_run import check_ppo_inputs
from meshift.runtime.role import LocalRole
from meshift.runtime.rollout_prompts import PromptSource
from meshift.runtime.rollout_run import HEADS, Checked, rollout_job, run_sampling
from meshift.runtime.run import Job, run_job
from meshift.runtime.spread_role import Everywhere, SpreadRole
from meshift.runtime.spread_state import SpreadRunState, follow
from meshift.runtime.spread_step import HOST, SpreadStep
from meshift.runtime.world import World

FINAL = {"actor": "final", "critic": "final_critic"}


def run_share(argument: str, rank: int, num_ranks: int, observer: Observer) -> dict[str, Any]:
    """The run of a config (JSON), as one process of several; gives the folder and the last metrics."""
    config = PPORunConfig.model_validate_json(argument)
    ranks = {Device(index=i): i for i in range(num_ranks)}
    world = World(rank=rank, ranks=ranks, group=dist.new_group(list(range(num_ranks)), backend="gloo"))
    if rank == HOST:
        result = run_job(config, lambda whole: build_share(whole, world).job, observer)
        return {
            "output_dir": str(result.output_dir),
            "final_dir": str(result.final_dir),
            "metrics": dict(result.metrics),
        }
    share = build_share(config, world)
    follow(share.job, share.roles, world, observer)
    share.job.save(Path(config.output_dir))
    return {}


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's part of a run."""

    job: Job
    roles: Mapping[str, SpreadRole]


def build_share(config: PPORunConfig, world: World) -> Share:
    """What `build_ppo_job` builds, with this process's part of each role."""
    checked = check_ppo_inputs(config)
    algorithm = PPO(config, run_sampling(config, checked))
    graph = algorithm.graph(checked.reward_functions(), checked.reward_keys)
    placements = placements_of(config, checked.names)
    roles = {name: _role(name, placements[name], config, checked, world) for name in checked.names}
    part_size = config.launch.stream_size if config.launch.stream else None
    step = SpreadStep(graph, roles, world, part_size)
    job = rollout_job(
        config,
        checked,
        PromptSource(config, checked.data.prompts, checked.columns),
        title=f"PPO in {len(world.ranks)} processes",
        graph=graph,
        roles={name: Everywhere(role) for name, role in roles.items()},
        save=lambda folder: _save(roles, checked, folder),
        memories={"ppo": algorithm},
    )
    make_state = partial(_state, roles, world)
    job = replace(job, roles={}, advance=step.run, make_state=make_state, placements=step.placements)
    return Share(job=job, roles=roles)


def _state(roles: Mapping[str, SpreadRole], world: World, none: Mapping[str, Any], *given: Any) -> SpreadRunState:
    """The run's state over its spread roles, where the job has no roles of its own."""
    assert not none
    return SpreadRunState(roles, world, *given)


def _role(name: str, placements: Any, config: PPORunConfig, checked: Checked, world: World) -> SpreadRole:
    trained = checked.trained.get(name)
    settings = trained or TrainableConfig(
        max_tokens_per_micro_batch=config.actor.max_tokens_per_micro_batch, logits_chunk=config.actor.logits_chunk
    )

    def whole() -> Decoder:
        model = open_model(checked.names[name], HEADS.get(name, "lm"), compute_dtype(config.dtype))
        if name == "critic" and config.critic.new_value_head:
            model.head.load_state_dict({"weight": torch.zeros(1, model.config.hidden_size)})
        return model

    def make(model: Decoder, place: Place, trainable: bool) -> LocalRole:
        role = LocalRole(
            name,
            model,
            settings,
            trainable=trainable,
            max_steps=checked.max_steps,
            seed=config.seed + (name == "critic"),
            place=place,
        )
        slots = config.generation.num_slots
        return role.can_generate(slots, checked.texts.decode_all) if name == "actor" else role

    return SpreadRole(name, placements, world, whole, make, settings.num_frozen_layers)


def _save(roles: Mapping[str, SpreadRole], checked: Checked, folder: Path) -> None:
    """Bring each trained role together in process 0, which saves it."""
    for name, final in FINAL.items():
        model = roles[name].whole()
        if model is not None:
            save_model(model, folder.with_name(final), tokenizer=checked.tokenizer)
