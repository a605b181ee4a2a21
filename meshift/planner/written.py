"""A choice as placements, and as the `plan:` section of a run's config. It knows nothing of how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshift.graph.calls import Kind
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device, Mesh
from meshift.planner.candidates import Problem
from meshift.planner.timeline import Choice, Spot
from meshift.planner.uses import Use
from meshift.planner.workload import Step


def placements_of(problem: Problem, choice: Choice) -> dict[str, dict[Kind, Placement]]:
    """Role -> kind of call -> placement. Devices have hosts where there are several: `node0`, `node1`, ...

    On one host devices without work are left out of the numbers, since a run starts a process for each.
    """
    used = sorted({i for spot in choice.values() for i in range(spot.first, spot.stop)})
    numbers = {device: number for number, device in enumerate(used)}
    found: dict[str, dict[Kind, Placement]] = {}
    for use, spot in choice.items():
        placement = Placement(mesh=_mesh(problem, spot, numbers), layout=spot.candidate.layout)
        found.setdefault(use.role, {})[use.kind] = placement
    return found


def devices_of(problem: Problem, choice: Choice) -> dict[Use, str]:
    """The devices of every use as its mesh is written; of several hosts, numbers through all of them."""
    if problem.num_devices > problem.hardware.per_host:
        return {use: spot.devices for use, spot in choice.items()}
    placed = placements_of(problem, choice)
    return {use: str(placed[use.role][use.kind].mesh) for use in choice}


def num_idle(problem: Problem, choice: Choice) -> int:
    """Devices that no call of the plan runs on."""
    return problem.num_devices - len({i for spot in choice.values() for i in range(spot.first, spot.stop)})


def step_of_choice(problem: Problem, choice: Choice) -> Step:
    """The step with the slots that were chosen for generation."""
    step = problem.step
    for use, spot in choice.items():
        if spot.candidate.slots is not None:
            step = step.with_slots(use.role, spot.candidate.slots)
    return step


def plan_values(problem: Problem, choice: Choice) -> dict[str, dict[str, Any]]:
    """What `plan:` of a run's config holds: `{"actor": {"train": {"mesh": "0-3", "layout": "d2t2p1"}}}`."""
    values: dict[str, dict[str, Any]] = {}
    for role, kinds in placements_of(problem, choice).items():
        written: dict[str, Any] = {k: {"mesh": str(p.mesh), "layout": str(p.layout)} for k, p in kinds.items()}
        if problem.step.roles[role].offloaded:
            written["offload"] = True
        slots = next((spot.candidate.slots for use, spot in choice.items() if use == Use(role, "generate")), None)
        if slots is not None:
            written["num_slots"] = slots
        values[role] = written
    return values


def named_hosts(values: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A plan's values with hosts of these names in place of `node0`, `node1`, ..."""

    def named(placement: Any) -> Any:
        if not isinstance(placement, Mapping):
            return placement  # `offload`
        devices = Mesh.parse(placement["mesh"]).devices
        hosts = [names[int(d.host.removeprefix("node"))] if d.host else "" for d in devices]
        there = (Device(host=host, index=d.index) for host, d in zip(hosts, devices, strict=True))
        return {**placement, "mesh": str(Mesh(devices=tuple(there)))}

    return {role: {kind: named(given) for kind, given in kinds.items()} for role, kinds in values.items()}


def _mesh(problem: Problem, spot: Spot, numbers: Mapping[int, int]) -> Mesh:
    per_host = problem.hardware.per_host
    if problem.num_devices <= per_host:
        return Mesh(devices=tuple(Device(index=numbers[i]) for i in range(spot.first, spot.stop)))
    return Mesh(
        devices=tuple(
            Device(host=f"node{i // per_host}", index=i % per_host) for i in range(spot.first, spot.stop)
        )
    )
