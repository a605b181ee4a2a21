"""How good a plan can be: OR-Tools' CP-SAT finds a better one or proves that there is none, or bounds the gap.

The model is that of `timeline.py`: each use has one candidate on a mesh, ops that share a device follow
program order, and for each call one cumulative constraint along the devices holds the memory. Where it is coarser,
it is so on the optimist's side: durations are rounded down to ticks, and what is late of a stream is the least of
all candidates. So its bound holds for every plan of these candidates. Without OR-Tools nothing is proven.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from math import floor
from typing import Any, NamedTuple

from meshift.layout.layout import Layout
from meshift.planner.bounds import Candidates, ended_before, least_seconds, reduced
from meshift.planner.candidates import GRAIN, Problem
from meshift.planner.search import score
from meshift.planner.timeline import FIRST_PART, Choice, Spot
from meshift.planner.uses import Op, Use

TICKS = 10_000
"""Of the best step known; with some ten ops rounding costs a bound a tenth of a percent."""
MAX_PAIRS = 3000
"""Pairs of candidates of a move that are told apart at first; with more, moves take no time."""
CLOSE = 0.001
"""A smaller gap is what rounding may leave."""
NUM_WORKERS = 2
THOUSANDTHS, LATE_GRAIN = 1000, 5
"""Shares are counted in thousandths; what is late of a stream in so many of them."""


@dataclass(frozen=True)
class Proof:
    """A plan, and seconds that no plan of the problem's candidates beats. `proven` is false without a solver."""

    choice: Choice
    seconds: float
    bound: float
    proven: bool

    @property
    def gap(self) -> float:
        """By which share the plan may be slower than the best."""
        return max(0.0, self.seconds / self.bound - 1) if self.bound > 0 else float("inf")


def has_solver() -> bool:
    """Whether OR-Tools is installed."""
    return find_spec("ortools") is not None


def prove(problem: Problem, known: Choice, *, seconds: float, workers: int = NUM_WORKERS) -> Proof:
    """Improve a plan that fits, or bound what could be gained.

    A better plan leaves fewer candidates that could be better still, and so the next model is smaller. There may
    be none from the first: slots that are no candidate's can beat all that are.
    """
    deadline = time.monotonic() + seconds
    found, limit = score(problem, known), MAX_PAIRS
    candidates = reduced(problem, problem.candidates, found.seconds)
    if not all(candidates.values()):
        return Proof(known, found.seconds, found.seconds, found.excess == 0 and has_solver())
    least = least_seconds(problem, candidates)
    if found.excess > 0 or not has_solver():
        return Proof(known, found.seconds, least, False)
    while (left := deadline - time.monotonic()) > 0:
        model = _Model(problem, candidates, known, found.seconds, Limits(limit, time.monotonic() + left / 3))
        choice, bound = model.solve(left, workers)
        least = max(least, min(bound, found.seconds))
        if choice is not None and score(problem, choice) < found:
            known, found = choice, score(problem, choice)
            candidates = reduced(problem, candidates, found.seconds)
        elif model.is_exact or found.seconds <= least * (1 + CLOSE):
            break
        else:
            limit *= 8
    return Proof(known, found.seconds, min(found.seconds, least), True)


class Limits(NamedTuple):
    """Of making a model: pairs of candidates that are told apart, and until when (`time.monotonic`)."""

    pairs: int
    deadline: float


class _Model:
    """The constraints, in ticks and in hundredths of a device's memory."""

    def __init__(
        self, problem: Problem, candidates: Candidates, known: Choice, seconds: float, limits: Limits
    ) -> None:
        from ortools.sat.python import cp_model

        self.solver_module: Any = cp_model
        self.problem, self.candidates, self.known = problem, candidates, known
        self.tick, self.limits, self.is_exact = seconds / TICKS, limits, True
        self.model: Any = cp_model.CpModel()
        self.chosen = {
            use: [self.model.NewBoolVar(f"{use} {one.layout}") for one in candidates[use]] for use in candidates
        }
        self.first: dict[Use, Any] = {}
        self.size: dict[Use, Any] = {}
        self.meets: dict[frozenset[Use], Any] = {}
        self.same: dict[Use, Any] = {}
        self.of_layout: dict[Use, dict[Layout, Any]] = {}
        for use in problem.uses:
            self._place(use)
        for i, use in enumerate(problem.uses):
            for other in problem.uses[:i]:
                self._separate(use, other)
        self._bind()
        self.step = self.model.NewIntVar(0, TICKS, "step")
        self._schedule()
        self._limit_memory()
        self._limit_area()
        self._limit_volume()
        self.model.Minimize(self.step)
        self._hint()

    def _sum(self, use: Use, values: list[int]) -> Any:
        """The value of the chosen candidate."""
        return sum(value * chosen for value, chosen in zip(values, self.chosen[use], strict=True))

    def _place(self, use: Use) -> None:
        """One candidate, on a mesh that begins where those of its size may (`Problem.stride`)."""
        model, num_devices = self.model, self.problem.num_devices
        model.AddExactlyOne(self.chosen[use])
        self.first[use] = model.NewIntVar(0, num_devices - 1, f"{use} first")
        self.size[use] = model.NewIntVar(1, num_devices, f"{use} size")
        model.Add(self.size[use] == self._sum(use, [one.size for one in self.candidates[use]]))
        model.Add(self.first[use] + self.size[use] <= num_devices)
        by_size: dict[int, list[Any]] = {}
        for one, chosen in zip(self.candidates[use], self.chosen[use], strict=True):
            by_size.setdefault(one.size, []).append(chosen)
        for size, some in by_size.items():
            stride = self.problem.stride(size)
            if stride == 1:
                continue
            number = model.NewIntVar(0, num_devices // stride, "")
            for chosen in some:
                model.Add(self.first[use] == stride * number).OnlyEnforceIf(chosen)

    def _separate(self, use: Use, other: Use) -> None:
        """They meet, or one mesh ends before the other begins."""
        before, after, meets = (self.model.NewBoolVar("") for _ in range(3))
        self.model.AddExactlyOne([before, after, meets])
        self.model.Add(self.first[use] + self.size[use] <= self.first[other]).OnlyEnforceIf(before)
        self.model.Add(self.first[other] + self.size[other] <= self.first[use]).OnlyEnforceIf(after)
        self.meets[frozenset((use, other))] = meets

    def _bind(self) -> None:
        """A trained role that is offloaded has one placement."""
        for use in self.problem.uses:
            home = self.problem.home(use.role)
            if use == home or not self.problem.is_bound(use.role):
                continue
            self.model.Add(self.first[use] == self.first[home])
            own, at_home = self._by_layout(use), self._by_layout(home)
            for layout in own.keys() | at_home.keys():
                self.model.Add(own.get(layout, 0) == at_home.get(layout, 0))

    def _schedule(self) -> None:
        ops = self.problem.ops
        self.starts = starts = [self.model.NewIntVar(0, TICKS, f"{op.name} start") for op in ops]
        lasts = [self._duration(op) for op in ops]
        self.ends = [start + last for start, last in zip(starts, lasts, strict=True)]
        for j, op in enumerate(ops):
            self.model.Add(self.ends[j] <= self.step)
            for i, earlier in enumerate(ops[:j]):
                if i in op.streams:
                    self._stream(i, j, starts, lasts)
                elif i in op.waits or set(op.uses) & set(earlier.uses):
                    self.model.Add(starts[j] >= self.ends[i])
                else:
                    for pair in {frozenset((a, b)) for a in op.uses for b in earlier.uses}:
                        self.model.Add(starts[j] >= self.ends[i]).OnlyEnforceIf(self.meets[pair])

    def _stream(self, i: int, j: int, starts: list[Any], lasts: list[Any]) -> None:
        """A reading that begins before generation ends, if they are on other devices."""
        earlier, op = self.problem.ops[i], self.problem.ops[j]
        meets = self.meets[frozenset((earlier.uses[0], op.uses[0]))]
        self.model.Add(starts[j] >= self.ends[i]).OnlyEnforceIf(meets)
        after = THOUSANDTHS * (starts[j] + lasts[j] - self.ends[i])
        for late, chosen in self._by_late(earlier).items():
            self.model.Add(after >= late * lasts[j] - THOUSANDTHS).OnlyEnforceIf(chosen)
        part = floor(FIRST_PART * THOUSANDTHS)
        self.model.Add(THOUSANDTHS * (starts[j] - starts[i]) >= part * lasts[i] - THOUSANDTHS)

    def _by_late(self, op: Op) -> dict[int, Any]:
        """For thousandths of a generation's rows that are late, rounded down, a literal that is true there."""
        found: dict[int, list[Any]] = {}
        for one, chosen in zip(self.candidates[op.uses[0]], self.chosen[op.uses[0]], strict=True):
            late = floor(one.costs[op.name].late * THOUSANDTHS)
            found.setdefault(late // LATE_GRAIN * LATE_GRAIN, []).append(chosen)
        return {late: self._either(some) for late, some in found.items()}

    def _duration(self, op: Op) -> Any:
        if op.kind == "call":
            use = op.uses[0]
            role, rate = self.problem.step.roles[use.role], self.problem.hardware.host_rate
            home = self.problem.home(use.role)
            least = min(one.leaving for one in self.candidates[home])  # what leaves is the home's
            leaving = [one.leaving if use == home else least for one in self.candidates[use]]
            away = [2 * size / rate if role.offloaded else 0.0 for size in leaving]
            return self._sum(
                use,
                [
                    self._ticks(one.least(op.name) + more)
                    for one, more in zip(self.candidates[use], away, strict=True)
                ],
            )
        return self._moving(op)

    def _ticks(self, seconds: float) -> int:
        return floor(seconds / self.tick)

    def _moving(self, op: Op) -> Any:
        """No less than its pair of candidates asks for where one mesh is in the other, or is not."""
        source, target = op.uses
        last, nested = self.model.NewIntVar(0, TICKS, ""), self._nested(source, target)
        sources, targets = self._by_layout(source), self._by_layout(target)
        if len(sources) * len(targets) > self.limits.pairs:
            self.is_exact = False
            return last
        for one, chosen in sources.items():
            if time.monotonic() > self.limits.deadline:
                self.is_exact = False
                break
            for other, with_it in targets.items():
                inside, outside = (
                    self._ticks(self.problem.moving_seconds(op, one, other, shift)) for shift in (0, None)
                )
                least = min(inside, outside)
                if least:
                    self.model.Add(last >= least).OnlyEnforceIf([chosen, with_it])
                if outside > least:
                    self.model.Add(last >= outside).OnlyEnforceIf([chosen, with_it, nested.Not()])
        return last

    def _by_layout(self, use: Use) -> dict[Layout, Any]:
        """For each layout a literal that is true where it is chosen, with however many slots."""
        if use not in self.of_layout:
            found: dict[Layout, list[Any]] = {}
            for one, chosen in zip(self.candidates[use], self.chosen[use], strict=True):
                found.setdefault(one.layout, []).append(chosen)
            self.of_layout[use] = {layout: self._either(some) for layout, some in found.items()}
        return self.of_layout[use]

    def _either(self, literals: list[Any]) -> Any:
        """At most one of which is true."""
        if len(literals) == 1:
            return literals[0]
        either = self.model.NewBoolVar("")
        self.model.Add(sum(literals) == either)
        return either

    def _nested(self, source: Use, target: Use) -> Any:
        """A literal that may be true only where one mesh lies in the other."""
        nested, inner, outer = (self.model.NewBoolVar("") for _ in range(3))
        self.model.AddBoolOr([inner, outer]).OnlyEnforceIf(nested)
        for a, b, literal in ((source, target, inner), (target, source, outer)):
            self.model.Add(self.first[b] <= self.first[a]).OnlyEnforceIf(literal)
            self.model.Add(self.first[a] + self.size[a] <= self.first[b] + self.size[b]).OnlyEnforceIf(literal)
        return nested

    def _limit_memory(self) -> None:
        """What all roles keep and what a call needs, at every device of the call."""
        problem, model = self.problem, self.model
        kept = {use: self._kept(use) for use in problem.uses}
        ends = {use: model.NewIntVar(1, problem.num_devices, "") for use in problem.uses}
        spans = {use: model.NewIntervalVar(self.first[use], self.size[use], ends[use], "") for use in problem.uses}
        for op in problem.ops:
            if op.kind != "call":
                continue
            use = op.uses[0]
            back = problem.step.roles[use.role].offloaded
            working = [self._units(one.working[op.name] + one.kept * back) for one in self.candidates[use]]
            demands = [*kept.values(), self._memory(use, working)]
            model.AddCumulative([*spans.values(), spans[use]], demands, self._units(problem.capacity))

    def _memory(self, use: Use, units: list[int]) -> Any:
        """The chosen candidate's, as a variable: a cumulative constraint takes no sums."""
        found = self.model.NewIntVar(0, max(units), "")
        self.model.Add(found == self._sum(use, units))
        return found

    def _units(self, num_bytes: float) -> int:
        return round(num_bytes / (GRAIN * self.problem.capacity))

    def _kept(self, use: Use) -> Any:
        home = self.problem.home(use.role)
        if self.problem.step.roles[use.role].offloaded:
            return 0
        if use == home:
            return self._memory(use, [self._units(one.kept) for one in self.candidates[use]])
        kept, same = self.model.NewIntVar(0, round(1 / GRAIN), ""), self.model.NewBoolVar("")
        self.same[use] = same
        self.model.Add(self.first[use] == self.first[home]).OnlyEnforceIf(same)
        at_home = self._by_layout(home)
        for one, chosen in zip(self.candidates[use], self.chosen[use], strict=True):
            self.model.Add(kept >= self._units(one.copy)).OnlyEnforceIf([chosen, same.Not()])
            also = [at_home[one.layout]] if one.layout in at_home else []
            self.model.AddBoolOr([chosen.Not(), same.Not(), *also])
        return kept

    def _limit_area(self) -> None:
        """Device-seconds of calls are not more than there are: of all, of those after one, of those before."""
        ops, count, over = self.problem.ops, self.problem.num_devices, ended_before(self.problem)
        areas = {
            i: self._sum(
                op.uses[0], [self._ticks(one.least(op.name)) * one.size for one in self.candidates[op.uses[0]]]
            )
            for i, op in enumerate(ops)
            if op.kind == "call"
        }
        self.model.Add(sum(areas.values()) <= count * self.step)
        for i in areas:
            after = [areas[j] for j in areas if i in over[j]]
            if after:
                self.model.Add(sum(after) <= count * (self.step - self.ends[i]))
            if over[i]:
                self.model.Add(sum(areas[j] for j in over[i]) <= count * self.starts[i])

    def _limit_volume(self) -> None:
        """What is kept over all devices, and a call's or two calls' that are apart, are not more than there is."""
        problem, most = self.problem, self._units(self.problem.capacity) * self.problem.num_devices
        kept = sum(self._volume(use) for use in problem.uses)
        working = {}
        for use in problem.uses:
            back = problem.step.roles[use.role].offloaded
            working[use] = self._sum(
                use,
                [
                    one.size * self._units(max(one.working.values()) + one.kept * back)
                    for one in self.candidates[use]
                ],
            )
            self.model.Add(kept + working[use] <= most)
        for pair, meets in self.meets.items():
            self.model.Add(kept + sum(working[use] for use in pair) <= most).OnlyEnforceIf(meets.Not())

    def _volume(self, use: Use) -> Any:
        """Hundredths of a device's memory, times devices, that a use keeps."""
        home, candidates = self.problem.home(use.role), self.candidates[use]
        if self.problem.step.roles[use.role].offloaded:
            return 0
        if use == home:
            return self._sum(use, [one.size * self._units(one.kept) for one in candidates])
        volumes = [one.size * self._units(one.copy) for one in candidates]
        found = self.model.NewIntVar(0, max(volumes), "")
        self.model.Add(found == self._sum(use, volumes)).OnlyEnforceIf(self.same[use].Not())
        return found

    def _hint(self) -> None:
        for use, spot in self.known.items():
            self.model.AddHint(self.first[use], spot.first)
            for one, chosen in zip(self.candidates[use], self.chosen[use], strict=True):
                known = spot.candidate
                self.model.AddHint(chosen, int((one.layout, one.slots) == (known.layout, known.slots)))

    def solve(self, seconds: float, workers: int) -> tuple[dict[Use, Spot] | None, float]:
        """A plan, if one was found, and the bound in seconds."""
        solver: Any = self.solver_module.CpSolver()
        solver.parameters.max_time_in_seconds = seconds
        solver.parameters.num_workers = workers
        status = solver.Solve(self.model)
        bound = max(0.0, solver.BestObjectiveBound()) * self.tick
        if status not in (self.solver_module.OPTIMAL, self.solver_module.FEASIBLE):
            # Nothing within the known plan's seconds but that one, which rounding may hide.
            return None, TICKS * self.tick if status == self.solver_module.INFEASIBLE else bound
        choice = {
            use: Spot(
                next(
                    one for one, x in zip(self.candidates[use], self.chosen[use], strict=True) if solver.Value(x)
                ),
                solver.Value(self.first[use]),
            )
            for use in self.problem.uses
        }
        return choice, bound
