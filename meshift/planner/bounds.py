"""What no plan can beat, and which candidates cannot be in a plan that is faster than one that is known.

Calls begin no earlier than what they wait for allows, each in its fastest layout. Calls that begin no earlier
than some time take their device-seconds, each in its thriftiest layout, over all devices. Two calls that may run
side by side do so on meshes that are small enough together, or one after the other. Of memory, what all roles
keep, over all their devices, with what one call needs, is not more than all devices have. It knows nothing of
where meshes lie.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

from meshift.planner.candidates import Problem
from meshift.planner.timeline import FIRST_PART
from meshift.planner.uses import Candidate, Use

Candidates = Mapping[Use, Sequence[Candidate]]
SLACK = 1e-9


def least_seconds(problem: Problem, candidates: Candidates) -> float:
    """No plan of these candidates is faster."""
    return _Least(problem, candidates).seconds()


def reduced(problem: Problem, candidates: Candidates, seconds: float) -> dict[Use, tuple[Candidate, ...]]:
    """Those that may be in a plan of at most so many seconds; of a use that has none left, none."""
    left = {use: tuple(found) for use, found in candidates.items()}
    before = -1
    while before != (now := sum(map(len, left.values()))) and all(left.values()):
        before = now
        for use, found in left.items():  # by what the others have left: one that goes may take others with it
            least, room = _Least(problem, left), _Room(problem, left)
            left[use] = tuple(
                one for one in found if least.seconds(use, one) <= seconds * (1 + SLACK) and room.has(use, one)
            )
            if not left[use]:
                break
    return left


def ended_before(problem: Problem) -> list[frozenset[int]]:
    """For each op the calls that have ended when it begins, in every plan."""
    begins, ends = list[frozenset[int]](), list[frozenset[int]]()
    for j, op in enumerate(problem.ops):
        begun: set[int] = set()
        for i in op.waits:
            begun |= begins[i] if i in op.streams else ends[i]
        over = {j, *begun}.union(*(ends[i] for i in op.waits))
        begins.append(_calls(problem, begun))
        ends.append(_calls(problem, over))
    return begins


def _calls(problem: Problem, numbers: set[int]) -> frozenset[int]:
    return frozenset(i for i in numbers if problem.ops[i].kind == "call")


class _Call(NamedTuple):
    """Least seconds, device-seconds over all devices, and share of a stream that is late."""

    seconds: float
    area: float
    late: float


@dataclass
class _Fast:
    """Of one call, by how many devices there may be at most: the least seconds."""

    sizes: list[int]
    seconds: list[float]

    def within(self, size: int) -> float:
        """On no more devices than so many."""
        return min((s for n, s in zip(self.sizes, self.seconds, strict=True) if n <= size), default=float("inf"))


class _Least:
    """The bounds by time, of all candidates or with one use held to one of them."""

    def __init__(self, problem: Problem, candidates: Candidates) -> None:
        self.problem, self.candidates = problem, candidates
        self.num_devices, self.over = problem.num_devices, ended_before(problem)
        self.calls = [i for i, op in enumerate(problem.ops) if op.kind == "call"]
        self.use = {i: problem.ops[i].uses[0] for i in self.calls}
        self.of = {i: self._least(i, candidates[self.use[i]]) for i in self.calls}
        self.fast = {i: self._fast(i, candidates[self.use[i]]) for i in self.calls}
        self.pairs = {
            (i, j): self._both(self.fast[i], self.fast[j])
            for i, j in combinations(self.calls, 2)
            if self._free(i, j)
        }

    def _free(self, i: int, j: int) -> bool:
        """Whether neither waits for the other, not even for its first part."""
        op = self.problem.ops[j]
        return self.use[i] != self.use[j] and i not in self.over[j] and i not in op.waits

    def _least(self, i: int, found: Sequence[Candidate]) -> _Call:
        name = self.problem.ops[i].name
        return _Call(
            min(one.least(name) for one in found),
            min(one.least(name) * one.size for one in found) / self.num_devices,
            min(one.costs[name].late for one in found),
        )

    def _fast(self, i: int, found: Sequence[Candidate]) -> _Fast:
        name, by_size = self.problem.ops[i].name, dict[int, float]()
        for one in found:
            by_size[one.size] = min(by_size.get(one.size, float("inf")), one.least(name))
        return _Fast(list(by_size), list(by_size.values()))

    def _both(self, one: _Fast, other: _Fast) -> float:
        """From the earlier's beginning to the later's end: in turns, or side by side on what there is."""
        turns = min(one.seconds) + min(other.seconds)
        beside = (
            max(seconds, other.within(self.num_devices - size))
            for size, seconds in zip(one.sizes, one.seconds, strict=True)
        )
        return min(turns, *beside)

    def seconds(self, use: Use | None = None, held: Candidate | None = None) -> float:
        """Of the last call's end."""
        of, pairs = self.of, self.pairs
        if use is not None and held is not None:
            changed = [i for i in self.calls if self.use[i] == use]
            of = {**of, **{i: self._least(i, (held,)) for i in changed}}
            fast = {i: self._fast(i, (held,)) for i in changed}
            pairs = {
                (i, j): self._both(fast.get(i, self.fast[i]), fast.get(j, self.fast[j]))
                if i in fast or j in fast
                else both
                for (i, j), both in pairs.items()
            }
        starts: dict[int, float] = {}
        ends: dict[int, float] = {}
        for j in self.calls:
            starts[j] = max([0.0, *self._earliest(j, starts, ends, of), *_all(self.over[j], starts, of, pairs)])
            ends[j] = max([starts[j] + of[j].seconds, *self._streamed(j, ends, of)])
        return max([*ends.values(), *_all(frozenset(self.calls), starts, of, pairs)])

    def _earliest(
        self, j: int, starts: Mapping[int, float], ends: Mapping[int, float], of: Mapping[int, _Call]
    ) -> Iterator[float]:
        op = self.problem.ops[j]
        for i in op.waits:
            if i in starts:
                yield starts[i] + FIRST_PART * of[i].seconds if i in op.streams else ends[i]

    def _streamed(self, j: int, ends: Mapping[int, float], of: Mapping[int, _Call]) -> Iterator[float]:
        for i in self.problem.ops[j].streams:
            yield ends[i] + of[i].late * of[j].seconds


def _all(
    calls: frozenset[int],
    starts: Mapping[int, float],
    of: Mapping[int, _Call],
    pairs: Mapping[tuple[int, int], float],
) -> Iterator[float]:
    """When they can all have ended: those that begin no earlier than some time, by area, and any two of them."""
    area = 0.0
    for i in sorted(calls, key=lambda i: starts[i], reverse=True):
        area += of[i].area
        yield starts[i] + area
    for (i, j), both in pairs.items():
        if i in calls and j in calls:
            yield min(starts[i], starts[j]) + both


class _Room:
    """The bound by memory: bytes times devices, of which a use takes no less than the least of its candidates."""

    def __init__(self, problem: Problem, candidates: Candidates) -> None:
        self.problem, self.candidates = problem, candidates
        self.most = problem.capacity * problem.num_devices
        self.least = {role: self._role(role) for role in problem.step.roles if self._uses(role)}

    def _uses(self, role: str) -> list[Use]:
        return [use for use in self.problem.uses if use.role == role]

    def _role(self, role: str, held: Mapping[Use, Sequence[Candidate]] | None = None) -> float:
        """The least that a role keeps: where it lives, and copies that cannot be there."""
        if self.problem.step.roles[role].offloaded:
            return 0.0
        home, found = self.problem.home(role), {**self.candidates, **(held or {})}
        total = float(min(one.kept * one.size for one in found[home]))
        at_home = {one.layout for one in found[home]}
        for use in self._uses(role):
            if use != home and not any(one.layout in at_home for one in found[use]):
                total += min(one.copy * one.size for one in found[use])
        return total

    def has(self, use: Use, one: Candidate) -> bool:
        """Whether there is room for a candidate beside what all roles keep."""
        kept = sum(least for role, least in self.least.items() if role != use.role)
        offloaded = self.problem.step.roles[use.role].offloaded
        needed = max(one.working.values()) + (one.kept if offloaded else 0)
        return kept + self._with(use, one) + needed * one.size <= self.most * (1 + SLACK)

    def _with(self, use: Use, one: Candidate) -> float:
        """What its role keeps at least: with a copy of its own, or where it lives."""
        home = self.problem.home(use.role)
        if use == home or self.problem.step.roles[use.role].offloaded:
            return self._role(use.role, {use: (one,)})
        copied = one.copy * one.size + min(other.kept * other.size for other in self.candidates[home])
        same = (other.kept * other.size for other in self.candidates[home] if other.layout == one.layout)
        return float(min([copied, *same]))
