"""What no plan can beat, and which candidates cannot be in a plan that is faster than one that is known.

Two bounds: the longest chain of calls that wait for each other, each in its fastest layout; and the device-seconds
of all calls, each in its thriftiest, over all devices. It knows nothing of meshes or memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshift.planner.candidates import Problem
from meshift.planner.uses import Candidate, Op, Use

Candidates = Mapping[Use, Sequence[Candidate]]


def least_seconds(problem: Problem, candidates: Candidates) -> float:
    """No plan of these candidates is faster."""
    return max(_chain(problem, candidates), _area(problem, candidates))


def reduced(problem: Problem, candidates: Candidates, seconds: float) -> dict[Use, tuple[Candidate, ...]]:
    """Those that may be in a plan of at most so many seconds."""
    return {
        use: tuple(
            one for one in found if least_seconds(problem, {**candidates, use: (one,)}) <= seconds * (1 + 1e-9)
        )
        for use, found in candidates.items()
    }


def _chain(problem: Problem, candidates: Candidates) -> float:
    ends: list[float] = []
    for op in problem.ops:
        if op.kind != "call":
            ends.append(0.0)
            continue
        seconds = min(one.least(op.name) for one in candidates[op.uses[0]])
        ends.append(max((_end(problem, op, i, ends, candidates, seconds) for i in op.waits), default=seconds))
    return max(ends)


def _end(problem: Problem, op: Op, i: int, ends: Sequence[float], candidates: Candidates, seconds: float) -> float:
    """The earliest end of a call that waits for op i: of one that streams, what is late comes after."""
    if i not in op.streams:
        return ends[i] + seconds
    earlier = problem.ops[i]
    late = min(one.costs[earlier.name].late for one in candidates[earlier.uses[0]])
    return ends[i] + late * seconds


def _area(problem: Problem, candidates: Candidates) -> float:
    total = sum(
        min(one.least(op.name) * one.size for one in candidates[op.uses[0]])
        for op in problem.ops
        if op.kind == "call"
    )
    return total / problem.num_devices
