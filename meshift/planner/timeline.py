"""When each op of a step runs under a choice of meshes and layouts, and what each device must hold meanwhile.

The planner's model: every process goes through ops in program order, so times follow from the choice alone. Small
enough to be asked for thousands of times. It knows nothing of how a choice comes about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshift.planner.candidates import Candidate, Op, Problem, Use

FIRST_PART = 0.1
"""Of a generation passes before others may begin to read."""


@dataclass(frozen=True)
class Spot:
    """A candidate on a mesh: the devices [first, stop)."""

    candidate: Candidate
    first: int

    @property
    def stop(self) -> int:
        """The device after the last."""
        return self.first + self.candidate.size

    def meets(self, other: Spot) -> bool:
        """Whether they have a device in common."""
        return self.first < other.stop and other.first < self.stop

    def within(self, other: Spot) -> bool:
        """Whether all its devices are the other's too."""
        return other.first <= self.first and self.stop <= other.stop

    def is_same(self, other: Spot) -> bool:
        """Whether both are one placement."""
        return self.first == other.first and self.candidate.layout == other.candidate.layout


Choice = Mapping[Use, Spot]


@dataclass(frozen=True)
class Bar:
    """An op on its devices for a time, in seconds into the step."""

    op: Op
    start: float
    end: float
    spots: tuple[Spot, ...]


def timeline(problem: Problem, choice: Choice) -> list[Bar]:
    """Every op of a step; those that take no time (a move to where the weights are) too."""
    bars: list[Bar] = []
    for op in problem.ops:
        spots = tuple(choice[use] for use in op.uses)
        seconds = op_seconds(problem, op, choice)
        start = 0.0
        for i, bar in enumerate(bars):
            if i in op.streams and not bar.spots[0].meets(spots[0]):
                late = bar.spots[0].candidate.costs[bar.op.name].late
                lead = bar.start + FIRST_PART * (bar.end - bar.start)
                start = max(start, lead, bar.end - (1 - late) * seconds)
            elif i in op.waits or any(mine.meets(theirs) for mine in spots for theirs in bar.spots):
                start = max(start, bar.end)
        bars.append(Bar(op, start, start + seconds, spots))
    return bars


def op_seconds(problem: Problem, op: Op, choice: Choice) -> float:
    """How long an op takes, by the candidates and by whether one mesh of a move is within the other."""
    if op.kind == "call":
        spot, role = choice[op.uses[0]], problem.step.roles[op.uses[0].role]
        away = 2 * spot.candidate.kept / problem.hardware.host_rate if role.offloaded else 0.0
        return spot.candidate.seconds[op.name] + away
    source, target = (choice[use] for use in op.uses)
    if op.kind == "move" and source.is_same(target):
        return 0.0
    nested = source.within(target) or target.within(source)
    return problem.moving_seconds(op, source.candidate.layout, target.candidate.layout, 0 if nested else None)


def step_seconds(problem: Problem, choice: Choice) -> float:
    """Until the last op has ended."""
    return max(bar.end for bar in timeline(problem, choice))


def kept_by(problem: Problem, use: Use, choice: Choice) -> int:
    """Bytes that a use keeps on each of its devices through the step."""
    home, spot = problem.home(use.role), choice[use]
    if problem.step.roles[use.role].offloaded:
        return 0
    if use == home:
        return spot.candidate.kept
    return 0 if spot.is_same(choice[home]) else spot.candidate.copy


def peak_bytes(problem: Problem, choice: Choice) -> dict[str, float]:
    """For each call, what the device of its mesh that needs the most must hold while it runs."""
    kept = {use: kept_by(problem, use, choice) for use in problem.uses}
    found: dict[str, float] = {}
    for op in problem.ops:
        if op.kind != "call":
            continue
        own = choice[op.uses[0]]
        places = {own.first, *(spot.first for spot in choice.values() if own.first <= spot.first < own.stop)}
        resident = max(
            sum(kept[use] for use, spot in choice.items() if spot.first <= place < spot.stop) for place in places
        )
        back = own.candidate.kept if problem.step.roles[op.uses[0].role].offloaded else 0
        found[op.name] = resident + back + own.candidate.working[op.name]
    return found


def excess_bytes(problem: Problem, choice: Choice) -> float:
    """By how much the worst call is over what a device has; 0: all fits."""
    return max(0.0, max(peak_bytes(problem, choice).values()) - problem.capacity)
