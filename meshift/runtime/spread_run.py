"""A run by a plan, in one of its processes: its share of the roles, and the same steps as everywhere.

The job is the one that a method builds for one process. Process 0 runs host calls, writes the run's folder and is
watched; the others follow it. It knows nothing of how processes are started, nor of what methods compute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from meshift.config.plan import LaunchConfig
from meshift.config.runs import DPORunConfig, KTORunConfig, PPORunConfig, RewardRunConfig, RunConfig, SFTRunConfig
from meshift.graph.ahead import halves_of
from meshift.layout.mesh import Device
from meshift.parallel.groups import new_group
from meshift.runtime import dpo_run, kto_run, pair_run, policy_run, ppo_run, reward_run, sft_run
from meshift.runtime.auto_plan import Settled
from meshift.runtime.observer import Observer, SilentObserver
from meshift.runtime.peaks import memory_in_use
from meshift.runtime.planned_run import Method, plan_file
from meshift.runtime.plans import Placements, placements_of
from meshift.runtime.role_spec import RoleSpec
from meshift.runtime.run import Job, run_job
from meshift.runtime.spread_ahead import SpreadAhead
from meshift.runtime.spread_role import Everywhere, SpreadRole
from meshift.runtime.spread_state import SpreadRunState, follow
from meshift.runtime.spread_step import HOST, SpreadStep
from meshift.runtime.world import World

METHODS: Mapping[type[RunConfig], Method] = MappingProxyType(
    {
        PPORunConfig: ppo_run.PPO_METHOD,
        DPORunConfig: dpo_run.DPO_METHOD,
        SFTRunConfig: sft_run.SFT_METHOD,
        RewardRunConfig: reward_run.REWARD_METHOD,
        KTORunConfig: kto_run.KTO_METHOD,
        **dict.fromkeys(pair_run.METHODS, pair_run.PAIR_METHOD),
        **dict.fromkeys(policy_run.CRITIC_FREE, policy_run.POLICY_METHOD),
    }
)


def run_share(argument: str, rank: int, num_ranks: int, observer: Observer) -> dict[str, Any]:
    """The run of a config (JSON, with its class), as one process of several; gives folders and last metrics."""
    told = json.loads(argument)
    schema = next(schema for schema in METHODS if schema.__name__ == told["run"])
    config = schema.model_validate_json(told["config"])
    ranks = {Device(index=i): i for i in range(num_ranks)}
    world = World(rank=rank, ranks=ranks, group=new_group(range(num_ranks), backend="gloo"))
    if rank == HOST:
        before = memory_in_use()

        def build(config: Any) -> Job:
            job = build_share(config, world, observer)[0]
            settled = Settled(config=config, found=told.get("found", {}))
            return replace(job, plan=plan_file(settled, METHODS[schema], job, before))

        result = run_job(config, build, observer)
        return {
            "output_dir": str(result.output_dir),
            "final_dir": str(result.final_dir),
            "metrics": dict(result.metrics),
        }
    job, roles = build_share(config, world, SilentObserver())
    follow(job, roles, world, observer)
    job.save(Path(config.output_dir))
    return {}


def build_share(config: RunConfig, world: World, observer: Observer) -> tuple[Job, Mapping[str, SpreadRole]]:
    """What the method builds, with this process's part of each role; and those."""
    method = METHODS[type(config)]
    opener = SpreadOpener(placements_of(config.plan, method.uses(config)), world, observer, config.plan.offloaded)
    return spread_job(method.build(config, opener), world, config.launch)


class SpreadOpener:
    """Opens this process's part of a role; those named `offloaded` leave the device between calls."""

    def __init__(
        self, placements: Placements, world: World, observer: Observer, offloaded: frozenset[str] = frozenset()
    ) -> None:
        self.observer = observer
        self._offloaded = offloaded
        self._placements, self._world = placements, world

    def open(self, spec: RoleSpec) -> Everywhere:
        """See `Opener`."""
        make = partial(spec.make, offload=spec.name in self._offloaded)
        opened = partial(spec.open_model, to_cut=True)
        given = (self._placements[spec.name], self._world, opened, make)
        return Everywhere(SpreadRole(spec.name, *given, spec.config))


def spread_job(job: Job, world: World, launch: LaunchConfig) -> tuple[Job, Mapping[str, SpreadRole]]:
    """A job whose roles were opened over several processes, run by all of them; and those roles."""
    opened: Mapping[str, Any] = job.roles
    roles: dict[str, SpreadRole] = {name: everywhere.role for name, everywhere in opened.items()}
    part_size = launch.stream_size if launch.stream else None
    step: SpreadStep | SpreadAhead = (
        SpreadStep(job.graph, roles, world, part_size)
        if job.queue is None
        else SpreadAhead(halves_of(job.graph), roles, world, job.queue, job.next_batch, part_size)
    )
    spread = replace(
        job,
        title=f"{job.title}, in {len(world.ranks)} processes",
        roles={},
        advance=step.run,
        make_state=partial(_state, roles, world),
        placements=step.placements,
        spread=tuple(roles.values()),
    )
    return spread, roles


def _state(roles: Mapping[str, SpreadRole], world: World, none: Mapping[str, Any], *given: Any) -> SpreadRunState:
    """The run's state over its spread roles, where the job has no roles of its own."""
    assert not none
    return SpreadRunState(roles, world, *given)
