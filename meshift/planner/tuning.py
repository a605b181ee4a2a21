"""Micro-batches for a plan whose placements are known: larger or smaller ones that make its step faster, and fit.

They change no result but its last bits. It knows nothing of how plans are found.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from meshift.planner.cost import Costs
from meshift.planner.evaluate import Placements, peak_bytes, replay
from meshift.planner.hardware import Hardware
from meshift.planner.workload import Step

TIMES = (0.125, 0.25, 0.5, 2, 4, 8, 16)
"""As many tokens as the config has, times these, are tried."""
WORTHWHILE = 0.01
"""Of a step: less is not worth another setting."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`<role>.max_tokens_per_micro_batch`, and the seconds of a step with it and all settings before."""

    role: str
    tokens: int
    seconds: float


def better_micro_batches(
    step: Step, hardware: Hardware, placements: Placements, *, streaming: bool = True
) -> list[Setting]:
    """For each trained role in turn the fastest micro-batches that fit, if they are worth it."""
    seconds_of = partial(_step_seconds, streaming=streaming)
    used = {device for kinds in placements.values() for p in kinds.values() for device in p.mesh.devices}
    shared = hardware.shared_by(len(used))
    trained = [name for name, role in step.roles.items() if role.trained]
    found: list[Setting] = []
    best = seconds_of(step, step, shared, placements)
    now = step
    for name in trained:
        passes = step.roles[name].passes.max_tokens_per_micro_batch
        tried = [(_with_tokens(now, name, max(1, int(times * passes)), trained), times) for times in TIMES]
        fitting = [(one, times) for one, times in tried if _fits(one, shared, placements)]
        timed = [(seconds_of(step, one, shared, placements), times, one) for one, times in fitting]
        seconds, times, changed = min(timed, key=lambda one: one[:2], default=(best, 1.0, now))
        if seconds < best * (1 - WORTHWHILE):
            best, now = seconds, changed
            found.append(Setting(role=name, tokens=max(1, int(times * passes)), seconds=seconds))
    return found


def _with_tokens(step: Step, name: str, tokens: int, trained: list[str]) -> Step:
    """Roles that stand still are read in the first trained role's micro-batches, as the runs do."""
    changed = {name, *(role for role in step.roles if role not in trained and name == trained[0])}
    roles = {
        key: replace(role, passes=role.passes.model_copy(update={"max_tokens_per_micro_batch": tokens}))
        if key in changed
        else role
        for key, role in step.roles.items()
    }
    return replace(step, roles=roles)


def _fits(step: Step, hardware: Hardware, placements: Placements) -> bool:
    return max(peak_bytes(step, hardware, placements).values()) <= hardware.usable


def _step_seconds(
    step: Step, changed: Step, hardware: Hardware, placements: Placements, *, streaming: bool
) -> float:
    """Of a step by the changed roles' costs; moves are those of the step."""
    costs = {
        call.name: Costs(changed.roles[call.role], hardware).of(call, placements[call.role][call.kind].layout)
        for call in changed.calls
    }
    (events,) = replay(step, hardware, placements, [costs], streaming=streaming)
    return max(event.end for event in events)
