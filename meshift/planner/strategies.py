"""How people lay out a step by hand, made as good as each way allows: what a plan is compared with.

Each is a search among the choices that the way leaves, so that a plan's gain is over its best form; None where it
leaves none. It knows nothing of other systems' code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, pairwise
from random import Random
from types import MappingProxyType

from meshift.layout.layout import Layout
from meshift.planner.bounds import least_seconds
from meshift.planner.candidates import Problem
from meshift.planner.search import Score, score
from meshift.planner.timeline import Choice, Spot
from meshift.planner.uses import Candidate, Use

ROUNDS = 4
"""Times that each use is given its best layout, given the others'."""
EIGHTHS = 8
"""Shares of the devices that roles of their own may have are multiples of one in so many."""


def one_layout(problem: Problem) -> dict[Use, Spot] | None:
    """All calls on all devices in one layout, sharded or not (DeepSpeed-Chat shards data ranks' state)."""
    alike = _for_all(problem)
    sharded = {
        layout
        for use in problem.uses
        for layout in problem.layouts(use)
        if layout.sharded and layout.pipeline == 1 and replace(layout, sharded=False) in alike
    }
    choices = [_everywhere(problem, layout) for layout in sorted(alike | sharded, key=str)]
    return min(choices, key=lambda choice: score(problem, choice), default=None)


def megatron(problem: Problem) -> dict[Use, Spot] | None:
    """ReaLHF's heuristic: tensor ranks within a host, as few stages as memory allows, data ranks else."""
    num_heads = min(role.config.num_heads for role in problem.step.roles.values())
    tensor = max(
        n
        for n in range(1, min(problem.hardware.per_host, num_heads) + 1)
        if problem.num_devices % n == 0 and num_heads % n == 0 and _on_one_host(problem, n)
    )
    most = min(role.config.num_layers for role in problem.step.roles.values())
    rest = problem.num_devices // tensor
    layouts = [
        Layout(data=rest // pipeline, tensor=tensor, pipeline=pipeline)
        for pipeline in range(1, min(rest, most) + 1)
        if rest % pipeline == 0
    ]
    alike = _for_all(problem)
    choices = [_everywhere(problem, layout) for layout in layouts if layout in alike]
    fitting = [choice for choice in choices if score(problem, choice).excess == 0]
    return fitting[0] if fitting else min(choices, key=lambda choice: score(problem, choice), default=None)


def colocated(problem: Problem) -> dict[Use, Spot] | None:
    """All calls on all devices, each in a layout of its own (as in verl)."""
    size = problem.num_devices
    if any(not _spots(problem, use, size, 0) for use in problem.uses):
        return None
    return _best(problem, dict.fromkeys(problem.uses, (size, 0)))


def split_by_role(problem: Problem) -> dict[Use, Spot] | None:
    """Generation, the actor's training, the critic, what stands still: each on devices of its own (OpenRLHF)."""
    splits = sorted(((_least(problem, areas), areas) for areas in _splits(problem)), key=lambda pair: pair[0])
    found: list[tuple[Score, dict[Use, Spot]]] = []
    for least, areas in splits:
        best = min((reached for reached, _ in found), default=None)
        if best is not None and best.excess == 0 and least >= best.seconds:
            break  # nor is any of the others faster
        choice = _best(problem, areas)
        found.append((score(problem, choice), choice))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _least(problem: Problem, areas: Mapping[Use, tuple[int, int]]) -> float:
    """Seconds that a step takes at least where uses have these devices."""
    there = {use: [spot.candidate for spot in _spots(problem, use, *area)] for use, area in areas.items()}
    return least_seconds(problem, there)


STRATEGIES: Mapping[str, Callable[[Problem], dict[Use, Spot] | None]] = MappingProxyType(
    {
        "one layout for all": one_layout,
        "split by role": split_by_role,
        "Megatron heuristic": megatron,
        "colocated": colocated,
    }
)


def _on_one_host(problem: Problem, tensor: int) -> bool:
    return problem.num_devices <= problem.hardware.per_host or problem.hardware.per_host % tensor == 0


def _for_all(problem: Problem) -> set[Layout]:
    """Layouts of all devices in which every use can run."""
    every = [{one for one in problem.layouts(use) if one.num_ranks == problem.num_devices} for use in problem.uses]
    return set.intersection(*every)


def _everywhere(problem: Problem, layout: Layout) -> dict[Use, Spot]:
    """With as many slots as fit."""
    choice = {use: Spot(problem.candidate(use, layout), 0) for use in problem.uses}
    for use in problem.uses:
        for slots in problem.slot_choices(use, layout):  # those of candidates, so that bounds hold for it
            if score(problem, choice).excess == 0:
                break
            choice[use] = Spot(problem.candidate(use, layout, slots), 0)
    return choice


def _best(problem: Problem, areas: Mapping[Use, tuple[int, int]]) -> dict[Use, Spot]:
    """Each use in its best layout on the devices that it is given: (how many, the first)."""
    spots = {use: _spots(problem, use, *area) for use, area in areas.items()}
    choice = {
        use: min(found, key=lambda spot: sum(spot.candidate.seconds.values())) for use, found in spots.items()
    }
    draw = Random(0)
    best = score(problem, choice)
    for _ in range(ROUNDS):
        before = best
        for use in draw.sample(problem.uses, len(problem.uses)):
            for spot in spots[use]:
                found = score(problem, {**choice, use: spot})
                if found < best:
                    choice, best = {**choice, use: spot}, found
        if best == before:
            break
    return choice


def _spots(problem: Problem, use: Use, size: int, first: int) -> list[Spot]:
    found: list[Candidate] = [one for one in problem.candidates[use] if one.size == size]
    if not found:
        every = (problem.candidate(use, layout) for layout in problem.layouts(use) if layout.num_ranks == size)
        found = sorted(every, key=lambda one: one.kept)[:8]
    return [Spot(one, first) for one in found]


def _splits(problem: Problem) -> Iterator[dict[Use, tuple[int, int]]]:
    """Every way to share out the devices among the groups: by eighths, of fewer devices by single ones."""
    groups = _groups(problem)
    parts = min(EIGHTHS, problem.num_devices)
    for shares in _compositions(parts, len(groups)):
        sizes = [share * problem.num_devices // parts for share in shares]
        if any(not _spots(problem, use, n, 0) for group, n in zip(groups, sizes, strict=True) for use in group):
            continue
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        yield {use: (n, a) for group, n, a in zip(groups, sizes, firsts, strict=True) for use in group}


def _groups(problem: Problem) -> list[list[Use]]:
    def group_of(use: Use) -> str:
        if use.kind == "generate":
            return "generation"
        return use.role if problem.step.roles[use.role].trained else "still"

    names = dict.fromkeys(group_of(use) for use in problem.uses)
    return [[use for use in problem.uses if group_of(use) == name] for name in names]


def _compositions(whole: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write `whole` as a sum of so many positive numbers, in order; none where it is too small."""
    for cuts in combinations(range(1, whole), count - 1):
        edges = (0, *cuts, whole)
        yield tuple(stop - start for start, stop in pairwise(edges))


def placed(choice: Choice) -> dict[str, str]:
    """In words: each use with its layout and devices."""
    return {str(use): f"{spot.candidate.layout}@{spot.devices}" for use, spot in choice.items()}
