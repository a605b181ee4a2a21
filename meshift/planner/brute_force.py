"""Every plan there is, on few devices: what other searches are tested against.

It shares the problem's numbers with them, but neither their code nor their ideas.
"""

from __future__ import annotations

from itertools import product

from meshift.planner.candidates import Problem
from meshift.planner.timeline import Spot, excess_bytes, step_seconds
from meshift.planner.uses import Use


def all_spots(problem: Problem, use: Use) -> list[Spot]:
    """Every layout and number of slots that fits alone or not, dominated or not, at every place of its size.

    On one host that is any, on several a multiple of its size; of whole hosts any.
    """
    return [Spot(one, first) for one in problem.all_candidates(use) for first in _firsts(problem, one.size)]


def _firsts(problem: Problem, size: int) -> list[int]:
    per_host, there = problem.hardware.per_host, problem.num_devices
    starts = [first for first in range(there) if first + size <= there]
    if there <= per_host:
        return starts
    return [first for first in starts if first % (per_host if size >= per_host else size) == 0]


def brute_force(problem: Problem) -> tuple[float, dict[Use, Spot]] | None:
    """Seconds and choice of a fastest plan that fits; None: none fits."""
    best: tuple[float, dict[Use, Spot]] | None = None
    for spots in product(*(all_spots(problem, use) for use in problem.uses)):
        choice = dict(zip(problem.uses, spots, strict=True))
        seconds = step_seconds(problem, choice)
        if (best is None or seconds < best[0]) and excess_bytes(problem, choice) == 0:
            best = seconds, choice
    return best
