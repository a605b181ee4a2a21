"""Micro-batches and slots for a plan whose placements are known: more or fewer that make its step faster, and fit.

They change no result but its last bits. It knows nothing of how plans are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from meshift.layout.layout import Layout
from meshift.planner.cost import Costs
from meshift.planner.evaluate import Placements, Player, hardware_there, peak_bytes, player
from meshift.planner.hardware import Hardware
from meshift.planner.memory import SLOT_STEP
from meshift.planner.workload import PlannedCall, Step

TIMES = (0.125, 0.25, 0.5, 2, 4, 8, 16)
"""As many tokens as the config has, times these, are tried."""
MOST_COUNTS = 64
"""Numbers of slots that are tried, about."""
WORTHWHILE = 0.01
"""Of a step: less is not worth another setting."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A key of a role's plan that differs from the config's, and the seconds of a step with it and all before."""

    role: str
    key: Literal["max_tokens_per_micro_batch", "num_slots"]
    value: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.role}.{self.key}={self.value}"


def better_settings(
    step: Step, hardware: Hardware, placements: Placements, *, streaming: bool = True
) -> list[Setting]:
    """Slots, then micro-batches."""
    play = player(step, hardware, placements, streaming=streaming)
    slots = better_slots(step, hardware, placements, play)
    step = with_settings(step, slots)
    return [*slots, *better_micro_batches(step, hardware, placements, play)]


def with_settings(step: Step, settings: Iterable[Setting]) -> Step:
    """The step as it is with them."""
    trained = [name for name, role in step.roles.items() if role.trained]
    for one in settings:
        if one.key == "num_slots":
            step = step.with_slots(one.role, one.value)
        else:
            step = _with_tokens(step, one.role, one.value, trained)
    return step


def settings_of(step: Step, asked: Step, seconds: float) -> Iterator[Setting]:
    """What a plan has to set, so that a run of the config of `asked` makes `step`, which takes so long."""
    for name, role in step.roles.items():
        slots = {c.num_slots for c in step.calls if _draws(c, name)}
        if slots != {c.num_slots for c in asked.calls if _draws(c, name)}:
            yield Setting(role=name, key="num_slots", value=max(slots), seconds=seconds)
        tokens = role.passes.max_tokens_per_micro_batch
        if role.trained and tokens != asked.roles[name].passes.max_tokens_per_micro_batch:
            yield Setting(role=name, key="max_tokens_per_micro_batch", value=tokens, seconds=seconds)


def smaller_passes(step: Step, halvings: int) -> Step:
    """With micro-batches of trained roles (and of those that are read with them) halved so many times."""
    trained = [name for name, role in step.roles.items() if role.trained]
    for name in trained:
        tokens = step.roles[name].passes.max_tokens_per_micro_batch >> halvings
        step = _with_tokens(step, name, max(1, tokens), trained)
    return step


def most_halvings(step: Step) -> int:
    """After which a micro-batch of any trained role is one text, so that more would change nothing."""
    longest = min(call.texts.longest for call in step.calls)
    most = max(role.passes.max_tokens_per_micro_batch for role in step.roles.values() if role.trained)
    return max(0, ceil(log2(most / longest)))


def better_slots(
    step: Step, hardware: Hardware, placements: Placements, play: Player | None = None
) -> list[Setting]:
    """For a role that generates, and by the step not all at once, the most useful slots that fit, if worth it."""
    play = play or player(step, hardware, placements)
    shared, found = hardware_there(hardware, placements), list[Setting]()
    for name in dict.fromkeys(call.role for call in step.calls if call.kind == "generate"):
        layout = placements[name]["generate"].layout
        given = next(call.num_slots for call in step.calls if _draws(call, name))
        more = [count for count in _slot_counts(step, name, layout) if count > given]
        if not more:
            continue
        tried = [given, *more]
        steps = [step.with_slots(name, count) for count in tried]
        costs = Costs(step.roles[name], shared)
        drawn = ({c.name: costs.of(c, layout) for c in one.calls if _draws(c, name)} for one in steps)
        seconds = [max(event.end for event in play(costs)) for costs in drawn]
        worth = [i for i in range(1, len(tried)) if seconds[i] < seconds[0] * (1 - WORTHWHILE)]
        worth.sort(key=lambda i: (seconds[i], tried[i]))
        best = next((i for i in worth if _fits(steps[i], shared, placements)), 0)
        if best:
            found.append(Setting(role=name, key="num_slots", value=tried[best], seconds=seconds[best]))
            step = steps[best]
    return found


def _slot_counts(step: Step, name: str, layout: Layout) -> Iterator[int]:
    """In whole steps of a session's memory, up to where all sequences of a data rank are decoded at once."""
    own = max(ceil(call.texts.num_sequences / layout.data) for call in step.calls if _draws(call, name))
    sessions = min(layout.pipeline, own)
    each = ceil(own / sessions)
    stride = SLOT_STEP * max(1, round(each / SLOT_STEP / MOST_COUNTS))
    for count in range(stride, each, stride):
        yield sessions * count
    yield sessions * each


def _draws(call: PlannedCall, role: str) -> bool:
    return call.kind == "generate" and call.role == role


def better_micro_batches(
    step: Step, hardware: Hardware, placements: Placements, play: Player | None = None
) -> list[Setting]:
    """For each trained role in turn the fastest micro-batches that fit, if they are worth it."""
    play = play or player(step, hardware, placements)
    shared = hardware_there(hardware, placements)
    trained = [name for name, role in step.roles.items() if role.trained]
    found: list[Setting] = []
    best = _step_seconds(play, step, shared, placements)
    now = step
    for name in trained:
        passes = step.roles[name].passes.max_tokens_per_micro_batch
        tried = [(_with_tokens(now, name, max(1, int(times * passes)), trained), times) for times in TIMES]
        timed = [(_step_seconds(play, one, shared, placements), times, one) for one, times in tried]
        worth = sorted((one for one in timed if one[0] < best * (1 - WORTHWHILE)), key=lambda one: one[:2])
        fitting = next((one for one in worth if _fits(one[2], shared, placements)), None)
        if fitting is not None:
            best, times, now = fitting
            value = max(1, int(times * passes))
            found.append(Setting(role=name, key="max_tokens_per_micro_batch", value=value, seconds=best))
    return found


def _with_tokens(step: Step, name: str, tokens: int, trained: list[str]) -> Step:
    """Roles that stand still are read in the first trained role's micro-batches, as the runs do."""
    changed = {name, *(role for role in step.roles if role not in trained and name == trained[0])}
    return step.with_passes(changed, max_tokens_per_micro_batch=tokens)


def _fits(step: Step, hardware: Hardware, placements: Placements) -> bool:
    return max(peak_bytes(step, hardware, placements).values()) <= hardware.usable


def _step_seconds(play: Player, changed: Step, hardware: Hardware, placements: Placements) -> float:
    """Of a step by the changed roles' costs; moves are those of the step as it was."""
    costs = {
        call.name: Costs(changed.roles[call.role], hardware).of(call, placements[call.role][call.kind].layout)
        for call in changed.calls
    }
    return max(event.end for event in play(costs))
