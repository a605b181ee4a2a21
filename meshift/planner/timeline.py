"""When each op of a step runs under a choice of meshes and layouts, and what each device must hold meanwhile.

The planner's model: every process goes through ops in program order, so times follow from the choice alone. Small
enough to be asked for thousands of times. It knows nothing of how a choice comes about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshift.planner.candidates import Problem
from meshift.planner.cost import WORK
from meshift.planner.uses import Candidate, Op, Use

FIRST_PART = 0.1
"""Of a generation passes before others may begin to read."""
SMALL = 1e-12
"""Seconds that are none."""


@dataclass(frozen=True)
class Spot:
    """A candidate on a mesh: the devices [first, stop)."""

    candidate: Candidate
    first: int

    @property
    def stop(self) -> int:
        """The device after the last."""
        return self.first + self.candidate.size

    @property
    def devices(self) -> str:
        """Their numbers, as `0-3` or `0`."""
        return str(self.first) if self.candidate.size == 1 else f"{self.first}-{self.stop - 1}"

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
    if problem.hardware.cores:
        return shared_timeline(problem, choice)
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


def shared_timeline(problem: Problem, choice: Choice) -> list[Bar]:
    """As `timeline`, where ops that run at the same time share the host's processors and slow each other down."""
    profile, ops = problem.hardware.profile, problem.ops
    assert profile is not None
    spots = [tuple(choice[use] for use in op.uses) for op in ops]
    seconds = [op_seconds(problem, op, choice) for op in ops]
    loads = [_load(op, choice) for op in ops]
    before = [_before(problem, i, spots, seconds) for i in range(len(ops))]
    held = [_held(problem, i, spots, seconds) for i in range(len(ops))]
    left, starts, ends = list(seconds), dict[int, float](), dict[int, float]()
    now = 0.0
    while len(ends) < len(ops):
        for i in range(len(ops)):
            if i not in starts and all(_is_past(j, part, left, seconds, starts) for j, part in before[i]):
                starts[i] = now
        running = [i for i in starts if i not in ends]
        running = [i for i in running if not _waits_for_last(held[i], left[i], ends)]
        busy = sum(loads[i][0] for i in running)
        speeds = {}
        for i in running:
            own, work = loads[i]
            alone = len(running) == 1
            speeds[i] = 1.0 if alone else profile.slow(work, own) / profile.slow(work, max(own, busy))
        marks = [(left[j] - (1 - part) * seconds[j]) / speeds[j] for b in before for j, part in b if j in speeds]
        marks += [(left[i] - part) / speeds[i] for i in running for j, part in held[i] if j not in ends]
        passed = min([left[i] / speeds[i] for i in running] + [mark for mark in marks if mark > SMALL])
        now += passed
        for i in running:
            left[i] -= passed * speeds[i]
            if left[i] <= SMALL and not _waits_for_last(held[i], left[i], ends):
                left[i], ends[i] = 0.0, now
    return [Bar(op, starts[i], ends[i], spots[i]) for i, op in enumerate(ops)]


def _load(op: Op, choice: Choice) -> tuple[float, str]:
    """Processes at work, and at what."""
    if op.kind == "call":
        return choice[op.uses[0]].candidate.costs[op.name].busy, WORK[op.uses[0].kind]
    first, second = (choice[use] for use in op.uses)
    within = first.within(second) or second.within(first)
    sizes = first.candidate.size, second.candidate.size
    return float(max(sizes) if within else sum(sizes)), "update"


def _before(
    problem: Problem, i: int, spots: Sequence[tuple[Spot, ...]], seconds: Sequence[float]
) -> list[tuple[int, float]]:
    """Earlier ops that op i waits for, and the part of each that must have passed."""
    found = []
    for j, earlier in enumerate(problem.ops[:i]):
        if j in problem.ops[i].streams and not spots[j][0].meets(spots[i][0]):
            late = spots[j][0].candidate.costs[earlier.name].late
            share = seconds[i] / seconds[j] if seconds[j] else 0.0
            found.append((j, max(FIRST_PART, 1 - (1 - late) * share)))
        elif j in problem.ops[i].waits or any(a.meets(b) for a in spots[i] for b in spots[j]):
            found.append((j, 1.0))
    return found


def _held(
    problem: Problem, i: int, spots: Sequence[tuple[Spot, ...]], seconds: Sequence[float]
) -> list[tuple[int, float]]:
    """Generations that op i reads while they go on, and how many of its seconds are for what ends last."""
    found = []
    for j in problem.ops[i].streams:
        if not spots[j][0].meets(spots[i][0]):
            found.append((j, spots[j][0].candidate.costs[problem.ops[j].name].late * seconds[i]))
    return found


def _waits_for_last(held: Sequence[tuple[int, float]], left: float, ends: Mapping[int, float]) -> bool:
    """Whether all has been read but what a generation, which others slow down, has yet to give."""
    return any(j not in ends and left <= part + SMALL for j, part in held)


def _is_past(
    j: int, part: float, left: Sequence[float], seconds: Sequence[float], starts: Mapping[int, float]
) -> bool:
    return j in starts and left[j] <= (1 - part) * seconds[j] + SMALL


def op_seconds(problem: Problem, op: Op, choice: Choice) -> float:
    """How long an op takes, by the candidates and by whether one mesh of a move is within the other."""
    if op.kind == "call":
        spot, role = choice[op.uses[0]], problem.step.roles[op.uses[0].role]
        home = choice[problem.home(op.uses[0].role)]
        away = 2 * home.candidate.leaving / problem.hardware.host_rate if role.offloaded else 0.0
        packed = 0.0 if spot.is_same(home) else spot.candidate.costs[op.name].parts.get("pack", 0.0)
        return spot.candidate.seconds[op.name] - packed * role.trained + away
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
    """For each call and move, what the device of its mesh that needs the most must hold while it runs."""
    kept = {use: kept_by(problem, use, choice) for use in problem.uses}
    found: dict[str, float] = {}
    for op in problem.ops:
        own = choice[op.uses[0]]
        if op.kind != "call":
            other = choice[op.uses[1]]
            if op.kind == "mixing" or not own.is_same(other):
                both = max(_resident(choice, kept, own), _resident(choice, kept, other))
                found[op.name] = both + problem.buffers(op, own.candidate.layout, other.candidate.layout)
            continue
        resident = _resident(choice, kept, own)
        back = own.candidate.kept if problem.step.roles[op.uses[0].role].offloaded else 0
        found[op.name] = resident + back + own.candidate.working[op.name]
    return found


def _resident(choice: Choice, kept: Mapping[Use, int], own: Spot) -> int:
    """What uses keep on that device of a mesh where they keep the most."""
    places = {own.first, *(spot.first for spot in choice.values() if own.first <= spot.first < own.stop)}
    return max(
        sum(kept[use] for use, spot in choice.items() if spot.first <= place < spot.stop) for place in places
    )


def excess_bytes(problem: Problem, choice: Choice) -> float:
    """By how much the worst call is over what a device has; 0: all fits.

    A trained role that is offloaded has one placement: for each use that has another it counts once more.
    """
    apart = 0
    for use, spot in choice.items():
        home = choice[problem.home(use.role)]
        apart += home.candidate.kept if problem.is_bound(use.role) and not spot.is_same(home) else 0
    return max(0.0, max(peak_bytes(problem, choice).values()) - problem.capacity) + apart
