"""A plan for a step on a cluster: found, proven, played through, compared; or what is short, and what would fit.

It knows nothing of how anything is shown.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from meshift.layout.layout import Layout
from meshift.planner.candidates import Problem
from meshift.planner.evaluate import Event, evaluate
from meshift.planner.hardware import Hardware
from meshift.planner.prove import Proof, prove
from meshift.planner.search import score, search
from meshift.planner.strategies import STRATEGIES
from meshift.planner.timeline import Choice, peak_bytes
from meshift.planner.tuning import Setting, better_settings
from meshift.planner.workload import Role, Step
from meshift.planner.written import placements_of, plan_values, step_of_choice

SEARCH_SHARE = 0.3
"""Of the time, for the local search before the proof."""
MOST_DOUBLINGS = 12


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A strategy by hand: seconds of its step (None: it cannot be), and bytes it lacks."""

    name: str
    seconds: float | None
    lacking: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan with what is known of it. `lacking`: bytes on the worst device (0: it fits); `changes` help."""

    problem: Problem
    proof: Proof
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
        """The step with the slots that the plan has, where those of the config do not fit."""
        return step_of_choice(self.problem, self.choice)

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """Slots and micro-batches other than the config's with which a step of this plan is faster."""
        problem = self.problem
        placements = placements_of(problem, self.choice)
        return tuple(better_settings(self.step, problem.hardware, placements, streaming=problem.streaming))

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """What `plan:` of a run's config holds, its micro-batches and slots too."""
        found = plan_values(self.problem, self.choice)
        for setting in self.settings:
            found[setting.role][setting.key] = setting.value
        return found

    @property
    def seconds(self) -> float:
        """Of a step with the config's micro-batches, as it was played through; without `settings`."""
        return max(event.end for event in self.events)


def make_plan(
    step: Step,
    hardware: Hardware,
    num_devices: int,
    *,
    seconds: float = 20.0,
    sharding: bool = True,
    streaming: bool = True,
) -> Planned:
    """The best plan that can be found in about so many seconds; roles are offloaded where nothing else fits.

    Where processes share processors, one process that has them all is a plan of its own.
    """
    if (
        hardware.cores
        and num_devices > 1
        and hardware.shared_by(1).threads > hardware.shared_by(num_devices).threads
    ):
        whole = partial(_made, step, hardware, sharding=sharding, streaming=streaming)
        found = [whole(1, 0.2 * seconds), whole(num_devices, 0.8 * seconds)]
        return min(found, key=lambda one: (one.lacking, one.seconds if one.events else float("inf")))
    return _made(step, hardware, num_devices, seconds, sharding=sharding, streaming=streaming)


def _made(
    step: Step, hardware: Hardware, num_devices: int, seconds: float, *, sharding: bool, streaming: bool
) -> Planned:
    problem = Problem(step, hardware, num_devices, sharding=sharding, streaming=streaming)
    hints = _by_hand(problem)
    choice = search(
        problem, seconds=SEARCH_SHARE * seconds, hints=[one for one in hints.values() if one is not None]
    )
    found = score(problem, choice)
    if found.excess > 0 or any(spot.candidate.slots is not None for spot in choice.values()):
        away = _offloaded(problem, seconds)
        if away is not None and score(*away) < found:
            problem, choice = away
        elif found.excess > 0:
            least = Proof(choice, found.seconds, 0.0, False)
            changes = tuple(_changes(problem, found.excess))
            return Planned(problem=problem, proof=least, lacking=found.excess, changes=changes)
    proof = _with_all_slots(problem, prove(problem, choice, seconds=(1 - SEARCH_SHARE) * seconds))
    step, placements = step_of_choice(problem, proof.choice), placements_of(problem, proof.choice)
    events = evaluate(step, hardware, placements, streaming=streaming)
    rivals = tuple(_rival(problem, name, choice) for name, choice in hints.items())
    return Planned(problem=problem, proof=proof, events=tuple(events), rivals=rivals)


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
        away = _with_roles(problem, partial(_away, names))
        choice = search(away, seconds=SEARCH_SHARE * seconds)
        if score(away, choice).excess == 0:
            return away, choice
    return None


def _with_roles(problem: Problem, change: Callable[[Role], Role], num_devices: int | None = None) -> Problem:
    roles: Mapping[str, Role] = {name: change(role) for name, role in problem.step.roles.items()}
    step = replace(problem.step, roles=roles)
    count = num_devices or problem.num_devices
    return Problem(step, problem.hardware, count, streaming=problem.streaming, sharding=problem.sharding)


def _changes(problem: Problem, lacking: float) -> Iterator[str]:
    """Single changes, the smallest first, with which a plan fits (found by trying); the device that would do."""
    trained = [name for name, role in problem.step.roles.items() if role.trained]
    recomputes = all(problem.step.roles[name].passes.gradient_checkpointing for name in trained)
    if not recomputes and _fits(_with_roles(problem, _checkpointing)):
        yield f"{' and '.join(trained)}: gradient_checkpointing=true, which computes activations again"
    for part in (2, 4, 8):
        if _fits(_with_roles(problem, partial(_smaller, part))):
            most = problem.step.roles[trained[0]].passes.max_tokens_per_micro_batch // part
            yield f"{' and '.join(trained)}: max_tokens_per_micro_batch={most}"
            break
    for count in _more_devices(problem):
        if _fits(_with_roles(problem, _as_it_is, count)):
            yield f"{count} devices instead of {problem.num_devices}"
            break
    yield f"devices with {(problem.hardware.memory + lacking) / 1e9:.0f} GB of memory each"


def _more_devices(problem: Problem) -> list[int]:
    """Doublings of the devices, from where all roles' states would fit if they were cut evenly."""
    alone = Layout()
    states = sum(m.kept(alone, alone.coordinates(0)).total for m in problem.memories.values())
    counts = [problem.num_devices << i for i in range(1, MOST_DOUBLINGS)]
    return [count for count in counts if count * problem.capacity > states][:3]


def _fits(problem: Problem) -> bool:
    return score(problem, search(problem, seconds=2.0)).excess == 0


def _checkpointing(role: Role) -> Role:
    return replace(role, passes=role.passes.model_copy(update={"gradient_checkpointing": True}))


def _away(names: Collection[str], role: Role) -> Role:
    return replace(role, offloaded=role.name in names)


def _as_it_is(role: Role) -> Role:
    return role


def _smaller(part: int, role: Role) -> Role:
    most = max(1, role.passes.max_tokens_per_micro_batch // part)
    return replace(role, passes=role.passes.model_copy(update={"max_tokens_per_micro_batch": most}))


def shortage(planned: Planned) -> list[str]:
    """What does not fit, by how much, in sentences."""
    problem, gigabyte = planned.problem, 1e9
    peaks = peak_bytes(problem, planned.choice)
    worst = max(peaks, key=lambda name: peaks[name])
    kept = {
        name: memory.kept(spot.candidate.layout, spot.candidate.layout.coordinates(0)).total
        for name, memory in problem.memories.items()
        for use, spot in planned.choice.items()
        if use == problem.home(name)
    }
    held = ", ".join(f"{name} {size / gigabyte:.1f} GB" for name, size in kept.items())
    return [
        f"nothing fits: the best that was found needs {peaks[worst] / gigabyte:.1f} GB on a device in `{worst}`, "
        f"where {problem.hardware.name} has {problem.capacity / gigabyte:.1f} GB for models and calls: "
        f"{planned.lacking / gigabyte:.1f} GB too much on each",
        f"roles keep on a device of theirs: {held}",
    ]
