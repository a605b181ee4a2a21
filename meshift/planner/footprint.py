"""What a device's memory holds while a call runs, by what it is, where `evaluate.peak_bytes` has one number.

It knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields

from meshift.layout.mesh import Device
from meshift.planner.evaluate import Placements, offloading_there
from meshift.planner.hardware import Hardware
from meshift.planner.memory import Kept, Memory, Working
from meshift.planner.workload import PlannedCall, Step

PARTS = (
    "weights",
    "optimizer",
    "gradients",
    "averages",
    "cache",
    "copies",
    "activations",
    "logits",
    "buffers",
    "heap",
)
WORDS = {
    "weights": "weights",
    "optimizer": "masters and moments",
    "gradients": "gradients",
    "averages": "moving averages",
    "cache": "KV cache",
    "copies": "weights once more",
    "activations": "activations",
    "logits": "logits",
    "buffers": "gathers and sums",
    "heap": "freed pieces between them",
}


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on one device during a call, of all roles that are there. `parts` has every name of `PARTS`."""

    device: Device
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


def footprints(step: Step, hardware: Hardware, placements: Placements, call: PlannedCall) -> list[Footprint]:
    """Of every device of a call's mesh, in the mesh's order."""
    step = offloading_there(step, hardware)
    memories = {name: Memory(role, hardware.machine) for name, role in step.roles.items()}
    placement = placements[call.role][call.kind]
    found = []
    for rank, device in enumerate(placement.mesh.devices):
        kept = Kept()
        for name, of_role in placements.items():
            if name == call.role or not step.roles[name].offloaded:
                kept += memories[name].on_device(of_role, device)
        where = placement.layout.coordinates(rank)
        working = memories[call.role].working(call, placement.layout, where)
        found.append(Footprint(device=device, parts=_parts(kept, working)))
    return found


def _parts(kept: Kept, working: Working) -> dict[str, int]:
    parts = {
        "weights": kept.weights,
        "optimizer": kept.masters + kept.moments,
        "gradients": kept.gradients,
        "averages": kept.averages,
        "cache": working.cache,
        "copies": working.copies,
        "activations": working.activations,
        "logits": working.logits,
        "buffers": working.gathered + working.reduction,
        "heap": working.heap,
    }
    counted = sum(parts.values())
    whole = kept.total + working.total
    if counted != whole:
        names = [one.name for one in (*fields(Kept), *fields(Working))]
        raise ValueError(f"of {whole} bytes {counted} have a name here; the fields are {', '.join(names)}")
    return parts


def worst(found: Iterable[Footprint]) -> Footprint:
    """The device that needs the most; the first of several."""
    return max(found, key=lambda one: one.total)


def in_words(footprint: Footprint, notable: float = 0.02) -> str:
    """`weights 20.1, KV cache 8.0 GB`: parts of at least so large a share, the largest first."""
    largest = sorted(footprint.parts.items(), key=lambda part: -part[1])
    named = [f"{WORDS[name]} {size / 1e9:.1f}" for name, size in largest if size >= notable * footprint.total]
    return f"{', '.join(named)} GB"


def tightest(by_call: Mapping[str, Sequence[Footprint]], capacity: float) -> str:
    """A sentence on the call and the device that need the most of so many bytes."""
    call, found = max(((call, worst(found)) for call, found in by_call.items()), key=lambda one: one[1].total)
    return (
        f"Memory is tightest in {call}: {found.total / 1e9:.1f} of {capacity / 1e9:.1f} GB on device "
        f"{found.device} ({in_words(found)})."
    )


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Devices whose peaks agree to a tenth of a gigabyte in every call; 0 where a device has no part in a call."""

    devices: Sequence[Device]
    peaks: Mapping[str, float]


def alike(by_call: Mapping[str, Sequence[Footprint]]) -> list[Alike]:
    """All devices in groups, in the order of their first; a peak is the largest of its group."""
    peaks: dict[Device, dict[str, float]] = {}
    for call, found in by_call.items():
        for one in found:
            peaks.setdefault(one.device, {})[call] = float(one.total)
    groups: dict[tuple[float, ...], list[Device]] = {}
    for device in sorted(peaks, key=lambda one: (len(one.host), one.host, one.index)):
        shown = tuple(round(peaks[device].get(call, 0.0), -8) for call in by_call)
        groups.setdefault(shown, []).append(device)
    return [
        Alike(
            devices=devices,
            peaks={call: max(peaks[device].get(call, 0.0) for device in devices) for call in by_call},
        )
        for devices in groups.values()
    ]
