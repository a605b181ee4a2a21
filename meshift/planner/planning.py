"""A plan for a step on a cluster: found, proven, played through, compared; or what is short, and what would fit.

It knows nothing of how anything is shown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from meshift.planner.bounds import least_seconds
from meshift.planner.candidates import Problem
from meshift.planner.evaluate import Event, evaluate
from meshift.planner.hardware import Hardware
from meshift.planner.prove import Proof, prove
from meshift.planner.remedies import changes_that_fit
from meshift.planner.search import Score, score, search
from meshift.planner.strategies import STRATEGIES
from meshift.planner.timeline import Choice, Spot
from meshift.planner.tuning import (
    Setting,
    better_settings,
    most_halvings,
    settings_of,
    smaller_passes,
    with_settings,
)
from meshift.planner.uses import Use
from meshift.planner.workload import Step
from meshift.planner.written import placements_of, plan_values, step_of_choice

SEARCH_SHARE = 0.3
"""Of the time, for the local search before the proof."""
TUNED_SHARE = 0.15
"""Of the time, for another once micro-batches or slots have changed."""
FEW_PROCESSES = 8
"""Up to which every number of processes that share processors is tried."""
MIN_SECONDS = 0.5
"""For each of these numbers."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A strategy by hand: seconds of its step (None: it cannot be), and bytes it lacks."""

    name: str
    seconds: float | None
    lacking: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with what is known of it. `lacking`: bytes on the worst device (0: it fits); `changes` help.

    `problem` is of the step with what the plan sets, `asked` the step by the config alone.
    """

    problem: Problem
    proof: Proof
    asked: Step
    events: tuple[Event, ...] = ()
    rivals: tuple[Rival, ...] = ()
    lacking: float = 0.0
    changes: tuple[str, ...] = ()

    @property
    def choice(self) -> Choice:
        """Where every use runs."""
        return self.proof.choice

    @cached_property
    def step(self) -> Step:
        """The step as the plan runs it: with its slots and micro-batches."""
        return step_of_choice(self.problem, self.choice)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Slots and micro-batches other than the config's, which the plan sets."""
        return tuple(settings_of(self.step, self.asked, self.seconds))

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """What `plan:` of a run's config holds, its micro-batches and slots too."""
        found = plan_values(self.problem, self.choice)
        for setting in self.settings:
            found[setting.role][setting.key] = setting.value
        return found

    @property
    def seconds(self) -> float:
        """Of a step as it was played through, with all that the plan sets."""
        return max(event.end for event in self.events)

    @property
    def gap(self) -> float:
        """By which share the plan may be slower than the best, by whichever count of its seconds is longer."""
        bound = self.proof.bound
        return max(self.proof.gap, self.seconds / bound - 1) if bound > 0 else self.proof.gap


def make_plan(
    step: Step,
    hardware: Hardware,
    num_devices: int,
    *,
    seconds: float = 20.0,
    sharding: bool = True,
    streaming: bool = True,
    known: Sequence[Planned] = (),
) -> Planned:
    """The best plan that can be found in about so many seconds; roles are offloaded where nothing else fits.

    Where processes share processors, fewer of them have more each: every number of them is a problem of its own.
    `known` are plans of like steps or of other numbers of devices: where one can be carried over and fits, the
    plan is no slower than it.
    """
    if not hardware.cores or num_devices == 1:
        problem = Problem(step, hardware, num_devices, sharding=sharding, streaming=streaming)
        return _made(problem, seconds, known)
    deadline, found = time.monotonic() + seconds, list[Planned]()
    counts = _counts_of_processes(hardware, num_devices)
    bound = float("inf")
    for i, count in enumerate(counts):
        problem = Problem(step, hardware, count, sharding=sharding, streaming=streaming)
        least = least_seconds(problem, problem.candidates)
        best = min((one.proof.seconds for one in found if one.lacking == 0), default=float("inf"))
        if least >= best:  # no plan of so many is faster
            bound = min(bound, least)
            continue
        share = max(MIN_SECONDS, (deadline - time.monotonic()) / (len(counts) - i))
        found.append(_made(problem, share, known))
    best_of_all = min(found, key=lambda one: (one.lacking, one.seconds if one.events else float("inf")))
    if best_of_all.lacking > 0:
        return best_of_all
    bound = min([bound, *(one.proof.bound for one in found if one.lacking == 0)])
    proven = all(one.proof.proven for one in found if one.lacking == 0)
    return replace(best_of_all, proof=replace(best_of_all.proof, bound=bound, proven=proven))


def _counts_of_processes(hardware: Hardware, num_devices: int) -> list[int]:
    """All up to a few; of more, for each number of processors that a process may have, the most of them."""
    on_a_host = min(num_devices, hardware.per_host)
    most = {hardware.shared_by(n).threads: n for n in range(1, on_a_host + 1)}
    counts = set(range(1, min(on_a_host, FEW_PROCESSES) + 1)) | set(most.values())
    return sorted({*counts, num_devices})


def _made(first: Problem, seconds: float, known: Sequence[Planned]) -> Planned:
    step, problem = first.step, first
    hints = _by_hand(problem)
    taken = [pair for one in known for pair in _carried_over(problem, one)]
    starts = [choice for choice in hints.values() if choice is not None]
    starts += [choice for other, choice in taken if other is problem]
    choice = search(problem, seconds=SEARCH_SHARE * seconds, hints=starts)
    problem, choice = min([(problem, choice), *taken], key=_score_of)
    found = score(problem, choice)
    if found.excess > 0 or any(spot.candidate.slots is not None for spot in choice.values()):
        problem, choice = min([(problem, choice), *_with_more_room(problem, found, seconds)], key=_score_of)
        found = score(problem, choice)
    if found.excess > 0:
        problem, choice = _least_short(problem, choice, seconds)
        return _nothing_fits(first, problem, choice, score(problem, choice).excess)
    problem, proof = _proven(problem, choice, seconds)
    placements, streaming = placements_of(problem, proof.choice), problem.streaming
    events = evaluate(step_of_choice(problem, proof.choice), problem.hardware, placements, streaming=streaming)
    lacking = max(event.peak for event in events) - problem.capacity
    if lacking > 0:  # by the count device by device, which is the stricter one
        return _nothing_fits(first, problem, proof.choice, lacking)
    rivals = _rivals(first, problem, hints)
    return Planned(problem=problem, proof=proof, asked=step, events=tuple(events), rivals=rivals)


def _proven(problem: Problem, choice: Choice, seconds: float) -> tuple[Problem, Proof]:
    """With the settings that suit the plan, and where the proof finds other placements, once more with theirs.

    So the bound is of the settings that the plan has. The second proof has what the first has left, or a share.
    """
    deadline = time.monotonic() + (1 - SEARCH_SHARE) * seconds
    problem, choice = _tuned(problem, choice, seconds) or (problem, choice)
    proof = _with_all_slots(problem, prove(problem, choice, seconds=deadline - time.monotonic()))
    again = _tuned(problem, proof.choice, seconds)
    if again is not None:
        problem, choice = again
        left = max(SEARCH_SHARE * seconds, deadline - time.monotonic())
        proof = _with_all_slots(problem, prove(problem, choice, seconds=left))
    return problem, proof


def _tuned(problem: Problem, choice: Choice, seconds: float) -> tuple[Problem, Choice] | None:
    """With settings that suit the placements, then with placements that suit these."""
    found = tuned(problem, choice)
    if found is None:
        return None
    changed, moved = found
    return changed, search(changed, seconds=TUNED_SHARE * seconds, hints=[moved])


def _carried_over(problem: Problem, known: Planned) -> Iterator[tuple[Problem, Choice]]:
    """Another plan's placements here, with its micro-batches and slots too where they are not the config's.

    On other numbers of devices: as they are, and with as many more or fewer data ranks.
    """
    if known.lacking > 0:
        return
    factor = problem.num_devices / known.problem.num_devices
    choices = [carried(problem, known.choice, by) for by in {1.0, factor}]
    for choice in choices:
        if choice is None:
            continue
        yield problem, choice
        if known.settings:
            yield _with_settings(problem, choice, known.settings)


def carried(problem: Problem, choice: Choice, factor: float = 1.0) -> dict[Use, Spot] | None:
    """The placements of another problem's plan, with `factor` times the data ranks; None where they cannot be."""
    found = {}
    for use in problem.uses:
        if use not in choice:
            return None
        spot = choice[use]
        data, first = spot.candidate.layout.data * factor, spot.first * factor
        if data != int(data) or first != int(first) or data < 1:
            return None
        layout = replace(spot.candidate.layout, data=int(data))
        if layout.data == 1 and layout.sharded:
            layout = replace(layout, sharded=False)
        there = layout in set(problem.layouts(use)) and int(first) in problem.offsets(layout.num_ranks)
        if not there:
            return None
        most = problem.calls(use)[0].num_slots
        slots = spot.candidate.slots if (spot.candidate.slots or most) < most else None
        found[use] = Spot(problem.candidate(use, layout, slots), int(first))
    return found


def _score_of(pair: tuple[Problem, Choice]) -> Score:
    return score(*pair)


def _with_more_room(problem: Problem, found: Score, seconds: float) -> Iterator[tuple[Problem, Choice]]:
    """The same step with what a plan may set so that calls need less; only plans that fit.

    Where nothing fits: smaller passes, the largest that do; else roles offloaded, with smaller passes if need be.
    """
    smaller = found.excess > 0
    if smaller and (less := _with_smaller_passes(problem, seconds)) is not None:
        yield less
        return
    away = _offloaded(problem, seconds)
    if away is None and smaller:
        halved = _of_step(problem, smaller_passes(problem.step, most_halvings(problem.step)))
        away = _offloaded(halved, seconds)
    if away is not None:
        yield away


def _with_smaller_passes(problem: Problem, seconds: float) -> tuple[Problem, Choice] | None:
    """With the largest passes, by halves, with which a plan is found; None: with none."""
    best, low, high = None, 1, most_halvings(problem.step)
    middle = high  # the smallest first: where these do not help, none do
    while low <= high:
        halved = _of_step(problem, smaller_passes(problem.step, middle))
        choice = search(halved, seconds=min(2.0, 0.1 * seconds), any_that_fits=True)
        if score(halved, choice).excess > 0:
            low = middle + 1
        else:
            best, high = (halved, choice), middle - 1
        middle = (low + high) // 2
    return best


def _least_short(problem: Problem, choice: Choice, seconds: float) -> tuple[Problem, Choice]:
    """The plan that lacks the least, with all that a plan may set against it: smallest passes, roles offloaded."""
    small = smaller_passes(problem.step, most_halvings(problem.step))
    away = [] if problem.hardware.machine.packs else [small.with_offloaded(small.roles)]
    others = [_of_step(problem, one) for one in (small, *away)]
    tried = [(other, search(other, seconds=min(2.0, 0.1 * seconds))) for other in others]
    return min([(problem, choice), *tried], key=_score_of)


def _nothing_fits(first: Problem, last: Problem, choice: Choice, lacking: float) -> Planned:
    """`first` is the problem as it was asked, `last` that of the choice, which lacks so many bytes."""
    least = Proof(choice, score(last, choice).seconds, 0.0, False)
    changes = tuple(changes_that_fit(first, lacking))
    return Planned(problem=last, proof=least, asked=first.step, lacking=lacking, changes=changes)


def tuned(problem: Problem, choice: Choice) -> tuple[Problem, Choice] | None:
    """The same placements with slots and micro-batches that make the step faster; None: the config's are best."""
    step, placements = step_of_choice(problem, choice), placements_of(problem, choice)
    settings = better_settings(step, problem.hardware, placements, streaming=problem.streaming)
    for count in range(len(settings), 0, -1):
        changed, moved = _with_settings(problem, choice, settings[:count])
        if score(changed, moved).excess == 0:
            return changed, moved
    return None


def _with_settings(problem: Problem, choice: Choice, settings: Sequence[Setting]) -> tuple[Problem, Choice]:
    """Slots up to those of the step are the choice's, more of them the step's, as micro-batches are."""
    slots = {Use(one.role, "generate"): one.value for one in settings if one.key == "num_slots"}
    most = {use: problem.calls(use)[0].num_slots for use in slots}
    of_step = [one for one in settings if one.key != "num_slots" or one.value > most[Use(one.role, "generate")]]
    changed = _of_step(problem, with_settings(problem.step, of_step))
    moved = dict[Use, Spot]()
    for use, spot in choice.items():
        count = slots.get(use, spot.candidate.slots)
        fewer = count if count is not None and count < changed.calls(use)[0].num_slots else None
        moved[use] = replace(spot, candidate=changed.candidate(use, spot.candidate.layout, fewer))
    return changed, moved


def _of_step(problem: Problem, step: Step) -> Problem:
    count, hardware = problem.num_devices, problem.hardware
    return Problem(step, hardware, count, streaming=problem.streaming, sharding=problem.sharding)


def _with_all_slots(problem: Problem, proof: Proof) -> Proof:
    """With the slots of the config wherever they fit: fewer are for the memory alone."""
    choice = dict(proof.choice)
    for use, spot in proof.choice.items():
        if spot.candidate.slots is not None:
            every = {**choice, use: replace(spot, candidate=problem.candidate(use, spot.candidate.layout))}
            choice = every if score(problem, every).excess == 0 else choice
    return replace(proof, choice=choice, seconds=score(problem, choice).seconds)


def _by_hand(problem: Problem) -> dict[str, Choice | None]:
    return {name: make(problem) for name, make in STRATEGIES.items()}


def _rivals(first: Problem, last: Problem, hints: Mapping[str, Choice | None]) -> tuple[Rival, ...]:
    """Each way by hand at its best: with the config's settings, or with those of the plan and what it offloads."""
    found = [_rival(first, name, choice) for name, choice in hints.items()]
    if last is first:
        return tuple(found)
    again = [_rival(last, name, choice) for name, choice in _by_hand(last).items()]
    return tuple(min(pair, key=_rank) for pair in zip(found, again, strict=True))


def _rank(rival: Rival) -> tuple[float, float]:
    return rival.lacking, float("inf") if rival.seconds is None else rival.seconds


def _rival(problem: Problem, name: str, choice: Choice | None) -> Rival:
    if choice is None:
        return Rival(name=name, seconds=None)
    found = score(problem, choice)
    return Rival(name=name, seconds=found.seconds, lacking=found.excess)


def _offloaded(problem: Problem, seconds: float) -> tuple[Problem, Choice] | None:
    """With roles away between their calls: those that stand still, else all. A CPU has no other memory."""
    if problem.hardware.machine.packs:
        return None
    still = {name for name, role in problem.step.roles.items() if not role.trained}
    for names in (still, set(problem.step.roles)):
        away = _of_step(problem, problem.step.with_offloaded(names))
        choice = search(away, seconds=SEARCH_SHARE * seconds)
        if score(away, choice).excess == 0:
            return away, choice
    return None
