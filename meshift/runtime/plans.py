"""A plan as a config writes it, as a placement for each call of PPO; and what a run by plan cannot do yet.

It starts no process and opens no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from meshift.config.plan import RolePlan
from meshift.config.runs import PPORunConfig
from meshift.errors import ConfigError, LayoutError
from meshift.graph.calls import Kind
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Device, Mesh
from meshift.runtime.hosts import named_devices, numbered, refuse_hosts

USES: Mapping[str, tuple[Kind, ...]] = {
    "actor": ("generate", "train"),
    "critic": ("infer", "train"),
    "reference": ("infer",),
    "reward": ("infer",),
}
"""The kinds of calls that PPO makes of each role."""

Placements = Mapping[str, Mapping[Kind, Placement]]


def placements_of(config: PPORunConfig, roles: Iterable[str]) -> dict[str, dict[Kind, Placement]]:
    """Role -> kind of call -> placement, for a PPO run's roles. Devices have the numbers of their processes.

    Raises `ConfigError` for a placement that cannot be, or that no call would use.
    """
    return numbered(_as_written(config, roles))


def mesh_of(config: PPORunConfig, roles: Iterable[str]) -> Mesh:
    """The devices of the run, one to a process and in that order, with hosts where the plan names them."""
    written = _as_written(config, roles)
    named = named_devices(written)
    return Mesh(devices=named or tuple(Device(index=i) for i in range(num_processes(written))))


def _as_written(config: PPORunConfig, roles: Iterable[str]) -> dict[str, dict[Kind, Placement]]:
    roles = list(roles)
    for role in type(config.plan).model_fields:
        if getattr(config.plan, role) is not None and role not in roles:
            raise ConfigError(f"`plan.{role}` is set, but the run has no such role; take it out")
    written = {role: _of_role(role, getattr(config.plan, role), USES[role]) for role in roles}
    if config.launch.launcher == "local":
        refuse_hosts(written)
    return written


def num_processes(placements: Placements) -> int:
    """One for each device up to the last that is named. Raises `ConfigError` for a gap."""
    used = {d.index for kinds in placements.values() for p in kinds.values() for d in p.mesh.devices}
    idle = sorted(set(range(max(used) + 1)) - used - {0})
    if idle:
        raise ConfigError(f"no placement of `plan` uses the device {idle[0]}; number the devices without gaps")
    return max(used) + 1


def _of_role(role: str, plan: RolePlan | None, used: Sequence[Kind]) -> dict[Kind, Placement]:
    if plan is None:
        return dict.fromkeys(used, Placement(mesh=Mesh(devices=(Device(index=0),)), layout=Layout()))
    given = {kind: p for kind in RolePlan.model_fields if (p := getattr(plan, kind)) is not None}
    if not given:
        raise ConfigError(f"`plan.{role}` names no placement; give it `train`, `infer` or `generate`")
    for kind in given:
        if kind not in used:
            raise ConfigError(f"`plan.{role}.{kind}` is set, but the {role} has no such call; take it out")
    placements: dict[Kind, Placement] = {}
    for kind in used:
        name = kind if kind in given else "train" if "train" in given else next(iter(given))
        try:
            placements[kind] = Placement.parse(given[name].mesh, given[name].layout)
        except LayoutError as error:
            raise ConfigError(f"`plan.{role}.{name}`: {error}") from None
        _check(f"plan.{role}.{name}", placements[kind])
    return placements


def _check(where: str, placement: Placement) -> None:
    if placement.layout.pipeline > 1 or placement.layout.sharded:
        raise ConfigError(
            f"`{where}.layout` is {placement.layout}: pipeline stages and sharded state are not there yet; use d "
            "and t"
        )
