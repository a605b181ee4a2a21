"""Local search for a plan: from several beginnings, one use at a time to its best place, then small disturbances.

It finds good plans in seconds and proves nothing (`prove.py` does). The same seed finds the same plan.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from random import Random

from meshift.planner.bounds import Candidates, reduced
from meshift.planner.candidates import Problem
from meshift.planner.timeline import Choice, Spot, excess_bytes, step_seconds, timeline
from meshift.planner.uses import Candidate, Use

NUM_SIZES = 5
"""Sizes of meshes that a first plan may have, from all devices downwards, each half of the one before."""


@dataclass(frozen=True, order=True)
class Score:
    """What plans are compared by: bytes over the memory, seconds of a step, device-seconds."""

    excess: float
    seconds: float
    used: float


def score(problem: Problem, choice: Choice) -> Score:
    """Of a plan; the less, the better."""
    bars = timeline(problem, choice)
    used = sum((bar.end - bar.start) * bar.spots[0].candidate.size for bar in bars)
    return Score(excess_bytes(problem, choice), max(bar.end for bar in bars), used)


def search(
    problem: Problem,
    *,
    seconds: float = 5.0,
    seed: int = 0,
    hints: Iterable[Choice] = (),
    any_that_fits: bool = False,
) -> Choice:
    """The best plan found in so many seconds, from `hints` and beginnings of its own.

    First where each use has few layouts to choose from, then among all that are left. `any_that_fits`: the first
    that does is enough.
    """
    begun, draw = time.monotonic(), Random(seed)
    starts = sorted((dict(first) for first in (*hints, *beginnings(problem))), key=partial(score, problem))
    few, ends = _quick(problem, problem.candidates), begun + seconds
    best = _explore(problem, few, starts, draw, begun + seconds / 2, any_that_fits=any_that_fits)
    return _explore(problem, problem.candidates, [best], draw, ends, any_that_fits=any_that_fits)


def _explore(
    problem: Problem,
    candidates: Candidates,
    starts: Sequence[Choice],
    draw: Random,
    deadline: float,
    *,
    any_that_fits: bool,
) -> dict[Use, Spot]:
    """Descend from the starts, then from disturbed versions of the best."""
    best, best_score = dict(starts[0]), score(problem, starts[0])
    disturbed = (_disturbed(problem, candidates, best, draw) for _ in range(MAX_DISTURBANCES))
    for first in chain(starts, disturbed):
        if time.monotonic() > deadline or (any_that_fits and best_score.excess == 0):
            break
        if best_score.excess == 0:
            candidates = _left(problem, candidates, best_score.seconds)
        found, found_score = _descend(problem, candidates, dict(first), deadline)
        if found_score < best_score:
            best, best_score = found, found_score
    return best


def _left(problem: Problem, candidates: Candidates, seconds: float) -> Candidates:
    """Those that may still be better; all of a use that would have none."""
    left = reduced(problem, candidates, seconds)
    return {use: left[use] or candidates[use] for use in candidates}


def _quick(problem: Problem, candidates: Candidates) -> Candidates:
    """Of each use and size the fastest layout, the smallest, and the fastest that needs half as much.

    All of roles that have one placement, since their uses must find the same.
    """
    return {use: tuple(found if problem.is_bound(use.role) else _few(found)) for use, found in candidates.items()}


def _few(found: Sequence[Candidate]) -> Iterator[Candidate]:
    by_size: dict[int, list[Candidate]] = {}
    for one in found:
        by_size.setdefault(one.size, []).append(one)
    for some in by_size.values():
        fastest = min(some, key=_total)
        small = [one for one in some if _needed(one) <= 0.5 * _needed(fastest)]
        few = (fastest, min(some, key=_needed), min(small or some, key=_total))
        yield from {id(one): one for one in few}.values()


def _total(one: Candidate) -> float:
    return sum(one.seconds.values())


def _needed(one: Candidate) -> float:
    return one.kept + max(one.working.values())


MAX_DISTURBANCES = 60
"""So that small problems end before their time, at the same plan on any machine."""


def beginnings(problem: Problem) -> Iterator[dict[Use, Spot]]:
    """All uses on the first n devices, each in its fastest layout there; n from all downwards."""
    sizes = sorted(problem.sizes(), reverse=True)[: 2 * NUM_SIZES : 2] or problem.sizes()
    for size in sizes:
        yield _together(
            problem, problem.candidates, {u: _nearest(problem.candidates[u], size, 0) for u in problem.uses}
        )


def _together(problem: Problem, candidates: Candidates, choice: Choice) -> dict[Use, Spot]:
    """With roles that have one placement all at home."""
    changed = dict(choice)
    for use in choice:
        home = problem.home(use.role)
        if problem.is_bound(use.role) and use != home:
            changed[use] = _moved(candidates[use], choice[use], choice[home]) or choice[use]
    return changed


def _moved(candidates: Sequence[Candidate], now: Spot, to: Spot) -> Spot | None:
    """A use in another's layout on its devices, if it may be, with the slots that it has where that can be."""
    found = [one for one in candidates if one.layout == to.candidate.layout]
    best = min(found, key=lambda one: (one.slots != now.candidate.slots, _total(one)), default=None)
    return None if best is None else Spot(best, to.first)


def _nearest(candidates: Sequence[Candidate], size: int, first: int) -> Spot:
    """The fastest candidate of so many devices, or of the number nearest to that."""
    found = min(candidates, key=lambda one: (abs(one.size - size), _total(one)))
    return Spot(found, first if found.size == size else 0)


def _descend(
    problem: Problem, candidates: Candidates, choice: dict[Use, Spot], deadline: float
) -> tuple[dict[Use, Spot], Score]:
    """Move one use after another to its best place until nothing gains."""
    best = score(problem, choice)
    improved = True
    while improved and time.monotonic() < deadline:
        improved = False
        for use in problem.uses:
            for spot in list(_places(problem, candidates[use], choice)):
                trial = _with(problem, candidates, choice, use, spot)
                if best.excess == 0 and step_seconds(problem, trial) > best.seconds:
                    continue
                found = score(problem, trial)
                if found < best:
                    choice, best, improved = trial, found, True
                if time.monotonic() > deadline:
                    break
    return choice, best


def _with(problem: Problem, candidates: Candidates, choice: Choice, use: Use, spot: Spot) -> dict[Use, Spot]:
    """With a use there, and where its role has one placement, all uses of the role."""
    changed = {**choice, use: spot}
    if problem.is_bound(use.role):
        for other in choice:
            if other.role == use.role and other != use:
                changed[other] = _moved(candidates[other], choice[other], spot) or choice[other]
    return changed


def _places(problem: Problem, candidates: Sequence[Candidate], choice: Choice) -> Iterator[Spot]:
    """Every candidate, at every offset where a mesh of another use begins or ends (others are alike)."""
    edges = {0, *(edge for spot in choice.values() for edge in (spot.first, spot.stop))}
    for candidate in candidates:
        size, step = candidate.size, problem.stride(candidate.size)
        firsts = {edge // step * step for edge in edges} | {-(-edge // step) * step for edge in edges}
        firsts |= {(edge - size) // step * step for edge in edges if edge >= size}
        for first in sorted(firsts):
            if 0 <= first <= problem.num_devices - size:
                yield Spot(candidate, first)


def _disturbed(problem: Problem, candidates: Candidates, choice: Choice, draw: Random) -> dict[Use, Spot]:
    """With two or three uses somewhere else, or with some roles on other devices than the rest."""
    changed = dict(choice)
    if draw.random() < 0.5:
        for use in draw.sample(problem.uses, min(len(problem.uses), draw.choice((2, 3)))):
            spot = draw.choice(list(_places(problem, candidates[use], changed)))
            changed = _with(problem, candidates, changed, use, spot)
        return changed
    size = draw.choice([size for size in problem.sizes() if 2 * size <= problem.num_devices] or [1])
    rest = max(n for n in problem.sizes() if n <= max(1, problem.num_devices - size))
    apart = {role for role in problem.step.roles if draw.random() < 0.5}
    for use in problem.uses:
        if use.role in apart:
            changed[use] = _nearest(candidates[use], size, (problem.num_devices - size) // size * size)
        else:
            changed[use] = _nearest(candidates[use], rest, 0)
    return _together(problem, candidates, changed)
