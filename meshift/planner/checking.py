"""A plan by hand, held against the model of memory: what is too much where, and single changes that mend it.

It knows nothing of how a plan is written, or of whether its layouts can be cut.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from math import ceil

from meshift.graph.calls import Kind
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Device, Mesh
from meshift.planner.evaluate import Placements, hardware_there, peak_bytes
from meshift.planner.hardware import Hardware
from meshift.planner.memory import SLOT_STEP, Memory
from meshift.planner.workload import PlannedCall, Step

GIGABYTE = 1e9
Change = tuple[str, Step, Placements]
"""In words, and the step and placements with it."""


def on_hosts(placements: Placements, per_host: int) -> dict[str, dict[Kind, Placement]]:
    """With numbers that count through hosts of so many devices written as host and number; others as they are."""

    def moved(device: Device) -> Device:
        if device.host:
            return device
        return Device(host=f"node{device.index // per_host}", index=device.index % per_host)

    devices = {d for kinds in placements.values() for p in kinds.values() for d in p.mesh.devices}
    if all(device.index < per_host for device in devices):
        return {role: dict(kinds) for role, kinds in placements.items()}
    return {
        role: {
            kind: Placement(mesh=Mesh(devices=tuple(map(moved, p.mesh.devices))), layout=p.layout)
            for kind, p in kinds.items()
        }
        for role, kinds in placements.items()
    }


def shortages(step: Step, hardware: Hardware, placements: Placements) -> list[str]:
    """A sentence for each call and move that needs more than a device has: what, how much, how much too much."""
    found = list(_moving_away(step, hardware, placements))
    hardware, calls = hardware_there(hardware, placements), {call.name: call for call in step.calls}
    for name, peak in peak_bytes(step, hardware, placements).items():
        if peak > hardware.usable:
            call = calls.get(name)
            cache = "" if call is None else _of_cache(step, hardware, placements, call)
            what = "the move of new weights" if call is None else f"{call.role}.{call.kind}"
            found.append(
                f"`{name}` ({what}) needs {peak / GIGABYTE:.1f} GB on a device, where "
                f"{hardware.name} has {hardware.usable / GIGABYTE:.1f} GB for models and calls: "
                f"{(peak - hardware.usable) / GIGABYTE:.1f} GB too much{cache}"
            )
    return found


def _moving_away(step: Step, hardware: Hardware, placements: Placements) -> Iterator[str]:
    """Roles that would leave a device for the host's memory, and have several placements, which a run refuses."""
    for name, role in step.roles.items():
        several = len(set(placements[name].values())) > 1
        if role.offloaded and several and not hardware.machine.packs:
            yield f"`plan.{name}.offload` is for roles with one placement, and this one moves between several"


def _of_cache(step: Step, hardware: Hardware, placements: Placements, call: PlannedCall) -> str:
    """What of it are keys and values of a generation's slots."""
    if call.kind != "generate":
        return ""
    memory, layout = Memory(step.roles[call.role], hardware.machine), placements[call.role][call.kind].layout
    ranks = map(layout.coordinates, range(layout.num_ranks))
    cache = max(memory.working(call, layout, rank).cache for rank in ranks)
    return f" ({cache / GIGABYTE:.1f} GB are keys and values of {slots_in_use(call, layout)} slots)"


def would_fit(step: Step, hardware: Hardware, placements: Placements) -> list[str]:
    """Single changes, with the same meshes, after which every call fits; else two of them at once.

    Of slots and of micro-batches there is one: the most that fit. Of what is offloaded, the fewest.
    """
    found = list(_fewer_slots(step, hardware, placements))
    for several in _changes(step, placements, can_leave=not hardware.machine.packs):
        helping = (words for words, changed, places in several if _fits(changed, hardware, places))
        found += islice(helping, 1)
    if not found:
        found += [w for w, changed, places in _two_changes(step, placements) if _fits(changed, hardware, places)]
    return found


def _fits(step: Step, hardware: Hardware, placements: Placements) -> bool:
    if any(_moving_away(step, hardware, placements)):
        return False
    return max(peak_bytes(step, hardware, placements).values()) <= hardware_there(hardware, placements).usable


def slots_in_use(call: PlannedCall, layout: Layout) -> int:
    """Of one data rank: no more than it has sequences."""
    return min(call.num_slots, ceil(call.texts.num_sequences / layout.data))


def _fewer_slots(step: Step, hardware: Hardware, placements: Placements) -> Iterator[str]:
    """For roles that generate, the most slots that fit; nothing else of the step takes longer for it."""
    for name in dict.fromkeys(call.role for call in step.calls if call.kind == "generate"):
        calls = [call for call in step.calls if (call.role, call.kind) == (name, "generate")]
        slots = max(slots_in_use(call, placements[name]["generate"].layout) for call in calls)
        fewer = most_slots(slots, partial(_fits_with, step, hardware, placements, name))
        if fewer is not None:
            yield f"{name}: num_slots={fewer}"


def most_slots(slots: int, fits: Callable[[int], bool]) -> int | None:
    """The most below these, in whole steps of a session's memory, with which a step fits; None: with none.

    Fewer need less, so that half of those that are left are tried at a time.
    """
    fewer = range(SLOT_STEP, slots, SLOT_STEP)
    count = bisect_left(fewer, True, key=lambda some: not fits(some))
    return fewer[count - 1] if count else None


def _fits_with(step: Step, hardware: Hardware, placements: Placements, name: str, slots: int) -> bool:
    return _fits(step.with_slots(name, slots), hardware, placements)


def _changes(step: Step, placements: Placements, *, can_leave: bool) -> Iterator[list[Change]]:
    """Each with its less far-reaching forms first."""
    trained = [name for name, role in step.roles.items() if role.trained]
    both, smaller = " and ".join(trained), list[Change]()
    for part in (2, 4, 8):
        first = step.roles[trained[0]].passes.max_tokens_per_micro_batch
        most = max(1, first // part)
        changed = step.with_passes(trained, max_tokens_per_micro_batch=most)
        smaller.append((f"{both}: max_tokens_per_micro_batch={most}", changed, placements))
    yield smaller
    shared = _sharded(placements, trained)
    if shared != placements:
        yield [(f"{both}: data ranks that share state out (`s` after the layout)", step, shared)]
    again = step.with_passes(trained, gradient_checkpointing=True)
    yield [(f"{both}: gradient_checkpointing=true", again, placements)]
    if can_leave:
        still = [name for name in step.roles if name not in trained]
        words = f"offload: true for {' and '.join(still)}"
        away = [(words, step.with_offloaded(still), placements)] if still else []
        yield [*away, ("offload: true for all roles", step.with_offloaded(step.roles), placements)]


def _two_changes(step: Step, placements: Placements) -> Iterator[Change]:
    trained = [name for name, role in step.roles.items() if role.trained]
    shared = _sharded(placements, trained)
    if shared != placements:
        again = step.with_passes(trained, gradient_checkpointing=True)
        yield f"{' and '.join(trained)}: gradient_checkpointing=true and `s` after the layout", again, shared


def _sharded(placements: Placements, names: list[str]) -> Mapping[str, Mapping[Kind, Placement]]:
    """With the state of trained roles shared out where they are trained on several data ranks."""

    def changed(role: str, kind: Kind, placement: Placement) -> Placement:
        layout = placement.layout
        if role not in names or kind != "train" or layout.data == 1 or layout.sharded:
            return placement
        shared = Layout(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline, sharded=True)
        return Placement(mesh=placement.mesh, layout=shared)

    return {role: {k: changed(role, k, p) for k, p in kinds.items()} for role, kinds in placements.items()}
