"""A plan as a config writes it, as a placement for each call of a method; and what a run by plan cannot do yet.

It starts no process and opens no model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from meshift.config.plan import KINDS, PlanConfig, RolePlan
from meshift.config.runs import RolloutRunConfig, RunConfig
from meshift.config.section import Section
from meshift.config.sections import TrainableConfig
from meshift.errors import ConfigError, LayoutError
from meshift.graph.calls import Call, Graph, Kind, LoopCall, ModelCall
from meshift.layout.boxes import boxes_of
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Device, Mesh
from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.shards import shard_table
from meshift.runtime.hosts import named_devices, numbered

C = TypeVar("C", bound=RunConfig)
ROLES = ("actor", "critic", "reference", "reward", "cost", "cost_critic")
Uses = Mapping[str, tuple[Kind, ...]]
"""Role -> the kinds of calls that a run makes of it."""
Placements = Mapping[str, Mapping[Kind, Placement]]


def uses_of(graph: Graph, *more: tuple[str, Kind]) -> dict[str, tuple[Kind, ...]]:
    """The kinds of calls that a graph makes of each role, and `more` that the run makes beside it."""
    found = {*more, *((call.role, call.kind) for call in _model_calls(graph.order()))}
    kinds = {role: tuple(kind for kind in KINDS if (role, kind) in found) for role in ROLES}
    return {role: used for role, used in kinds.items() if used}


def _model_calls(calls: Sequence[Call]) -> list[ModelCall]:
    """Those within loops too."""
    found: list[ModelCall] = []
    for call in calls:
        if isinstance(call, LoopCall):
            found += _model_calls(call.graph.order())
        elif isinstance(call, ModelCall):
            found.append(call)
    return found


def placements_of(plan: PlanConfig, uses: Uses) -> dict[str, dict[Kind, Placement]]:
    """Role -> kind of call -> placement, for a run's roles. Devices have the numbers of their processes.

    Raises `ConfigError` for a placement that cannot be, or that no call would use.
    """
    return numbered(as_written(plan, uses))


def mesh_of(plan: PlanConfig, uses: Uses) -> Mesh:
    """The devices of the run, one to a process and in that order, with hosts where the plan names them."""
    written = as_written(plan, uses)
    named = named_devices(written)
    return Mesh(devices=named or tuple(Device(index=i) for i in range(num_processes(written))))


def as_written(plan: PlanConfig, uses: Uses) -> dict[str, dict[Kind, Placement]]:
    """As `placements_of`, with hosts where the plan names them."""
    for role in plan.roles:
        if role not in uses:
            raise ConfigError(f"`plan.{role}` is set, but the run has no such role; take it out")
    return {role: _of_role(role, getattr(plan, role, None), kinds) for role, kinds in uses.items()}


def with_plan_settings(config: C, roles: Collection[str]) -> C:
    """The config with its plan's micro-batches and slots in place of its own; `roles` are the run's.

    Raises `ConfigError` for a role that is not, for micro-batches of one that is not trained (it is read in
    another's), and for slots of one that draws nothing.
    """
    changed: dict[str, Section] = {}
    for role, plan in config.plan.roles.items():
        tokens = plan.max_tokens_per_micro_batch
        if (tokens is not None or plan.num_slots is not None) and role not in roles:
            raise ConfigError(f"`plan.{role}` is set, but the run has no such role; take it out")
        if plan.num_slots is not None:
            if role != "actor" or not isinstance(config, RolloutRunConfig):
                raise ConfigError(f"`plan.{role}.num_slots` is set, but the {role} draws nothing; take it out")
            changed["generation"] = config.generation.model_copy(update={"num_slots": plan.num_slots})
        if tokens is None:
            continue
        key = next((k for k in (role, "model") if isinstance(getattr(config, k, None), TrainableConfig)), None)
        if key is None:
            raise ConfigError(
                f"`plan.{role}.max_tokens_per_micro_batch` is set, but the {role} is not trained: it is read in "
                "the actor's micro-batches; take it out"
            )
        changed[key] = getattr(config, key).model_copy(update={"max_tokens_per_micro_batch": tokens})
    return config.model_copy(update=changed) if changed else config


def num_processes(placements: Placements) -> int:
    """One for each device up to the last that is named. Raises `ConfigError` for a gap."""
    used = {d.index for kinds in placements.values() for p in kinds.values() for d in p.mesh.devices}
    idle = sorted(set(range(max(used) + 1)) - used - {0})
    if idle:
        raise ConfigError(f"no placement of `plan` uses the device {idle[0]}; number the devices without gaps")
    return max(used) + 1


def check_cuts(
    role: str,
    model: DecoderConfig,
    head: HeadKind,
    placements: Mapping[Kind, Placement],
    given: Collection[Kind] = (),
) -> None:
    """Raise `ConfigError` where a layout cuts a role's model into more parts than it has.

    `given` are the kinds that the config names: where one of them has that layout, it is blamed.
    """
    table = shard_table(model, head)
    for kind, placement in sorted(placements.items(), key=lambda item: item[0] not in given):
        try:
            boxes_of(placement.layout, table, 0)
        except LayoutError as error:
            raise ConfigError(f"`plan.{role}.{kind}`: {error}") from None


def in_words(placements: Placements) -> str:
    """Every call's placement, and how many processes that makes."""
    calls = [f"{role}.{kind} {p}" for role, kinds in placements.items() for kind, p in kinds.items()]
    return f"{num_processes(placements)} processes: {', '.join(calls)}"


def _of_role(role: str, plan: RolePlan | None, used: Sequence[Kind]) -> dict[Kind, Placement]:
    if plan is None or (plan.stays_in_process and not plan.placements):
        return dict.fromkeys(used, Placement(mesh=Mesh(devices=(Device(index=0),)), layout=Layout()))
    given = plan.placements
    if not given:
        raise ConfigError(f"`plan.{role}` names no placement; give it `train`, `infer` or `generate`")
    for kind in given:
        if kind not in used:
            raise ConfigError(f"`plan.{role}.{kind}` is set, but the {role} has no such call; take it out")
    placements: dict[Kind, Placement] = {}
    for kind in used:
        name = kind if kind in given else "train" if "train" in given else next(iter(given))
        if kind not in given and "train" not in given and len(given) > 1:
            raise ConfigError(f"`plan.{role}` does not say where its `{kind}` calls run; give it `{kind}` too")
        try:
            placements[kind] = Placement.parse(given[name].mesh, given[name].layout)
        except LayoutError as error:
            raise ConfigError(f"`plan.{role}.{name}`: {error}") from None
    return placements
