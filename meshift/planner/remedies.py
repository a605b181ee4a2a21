"""What would make a step fit that does not: changes found by trying them, in a reader's words.

What a plan sets by itself (slots, micro-batches, offloading) is no change; with each change it is tried too. It
knows nothing of how good the plans are that would fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from meshift.config.sections import LoraConfig
from meshift.layout.layout import Layout
from meshift.models.hf.adapter_targets import adapter_for
from meshift.planner.candidates import Problem
from meshift.planner.hardware import KNOWN, Hardware
from meshift.planner.search import score, search
from meshift.planner.tuning import most_halvings, smaller_passes
from meshift.planner.workload import Role, Step

MOST_HOSTS = 1024
"""That are advised."""
TRY_SECONDS = 1.0
"""For each search."""
ALL_SECONDS = 15.0
"""After which no further change is tried."""
TOLD = 6
"""Changes at most."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of a config, in words, and the step with it."""

    words: str
    made: Callable[[Step], Step]


def changes_that_fit(problem: Problem, lacking: float) -> Iterator[str]:
    """Changes with which a plan fits: of the config, of both, of the devices; at most `TOLD`.

    `lacking`: bytes on a device of the best that was found as it is.
    """
    deadline, count = time.monotonic() + ALL_SECONDS, problem.num_devices
    found = list[str]()
    for words in _in_turn(problem, lacking):
        found.append(words)
        if len(found) == TOLD or time.monotonic() > deadline:
            break
    if not found and time.monotonic() > deadline:
        found.append(f"more than {count} devices (how many was not found in {ALL_SECONDS:.0f} s)")
    yield from found


def _in_turn(problem: Problem, lacking: float) -> Iterator[str]:
    step, count, hardware = problem.step, problem.num_devices, problem.hardware
    changes = list(_of_config(step))
    alone = [one for one in changes if _fits(problem, one.made(step), count)]
    yield from (one.words for one in alone)
    left = [one for one in changes if one not in alone]
    for first, second in combinations(left, 2):
        if _fits(problem, second.made(first.made(step)), count):
            yield f"{first.words}, and {second.words}"
    most = _fewest_devices(problem, step, _counts(hardware, count))
    if most is not None:
        yield f"{most} devices instead of {count}"
    for one in left:
        fewer = [n for n in _counts(hardware, count) if most is None or n < most]
        enough = _fewest_devices(problem, one.made(step), fewer)
        if enough is not None:
            yield f"{enough} devices instead of {count}, and {one.words}"
    yield from _of_hardware(problem, lacking)


def _of_config(step: Step) -> Iterator[Change]:
    """What changes how much a role keeps or needs, and is not the planner's to choose."""
    trained = [name for name, role in step.roles.items() if role.trained]
    both = " and ".join(trained)
    if not all(step.roles[name].passes.gradient_checkpointing for name in trained):
        yield Change(
            words=f"{both}: gradient_checkpointing=true, which computes activations again", made=_recomputed
        )
    if any(step.roles[name].config.adapter is None for name in trained):
        yield Change(words=f"{both}: lora, which trains adapters of rank {LoraConfig().rank} alone", made=_adapted)
    draws = any(call.kind == "generate" for call in step.calls)
    still = "reference" in step.roles and not any(m.target == "reference" for m in step.mixings)
    if draws and still and "critic" not in step.roles:  # PPO always reads one
        yield Change(
            words="kl_coef=0 (where the method has it), which needs no reference", made=_without_reference
        )


def _of_hardware(problem: Problem, lacking: float) -> Iterator[str]:
    """Known devices with more memory that would do; a host's memory where processes share it."""
    own, count = problem.hardware, problem.num_devices
    if own.machine.packs:
        whole = own.memory + lacking * (own.processes if own.cores else 1)
        yield f"{whole / 1e9:.0f} GB of memory on the host"
        return
    larger = [one for one in KNOWN.values() if one.usable > own.usable]
    fitting = []
    for one in sorted(larger, key=lambda one: one.memory):
        if _fits(problem, problem.step, count, replace(one, per_host=own.per_host)):
            fitting.append(one.name)
    if fitting:
        yield f"{' or '.join(fitting)} in place of {own.name}"


def _counts(hardware: Hardware, count: int) -> list[int]:
    """Numbers of devices above this one that clusters have: any within a host, then whole hosts."""
    per_host = hardware.per_host
    hosts = {k << i for i in range(MOST_HOSTS.bit_length()) for k in (1, 3)} | set(range(1, 17))
    sizes = {*range(1, per_host + 1), *(per_host * k for k in hosts if k <= MOST_HOSTS)}
    return sorted(n for n in sizes if n > count)


def _fewest_devices(problem: Problem, step: Step, counts: Sequence[int]) -> int | None:
    """By halves, since with more devices each keeps less; from where all roles' states could be cut evenly."""
    alone = Layout()
    memories = Problem(step, problem.hardware, 1).memories.values()
    states = [memory.kept(alone, alone.coordinates(0)).total for memory in memories]
    least = sum(states) if problem.hardware.machine.packs else max(states)
    counts = [n for n in counts if n * problem.capacity > least][:16]
    low, high, best = 0, len(counts) - 1, None
    while low <= high:
        middle = (low + high) // 2
        if _fits(problem, step, counts[middle]):
            best, high = counts[middle], middle - 1
        else:
            low = middle + 1
    return best


def _fits(problem: Problem, step: Step, count: int, hardware: Hardware | None = None) -> bool:
    """With the smallest passes; and with all roles offloaded, where they can be."""
    hardware = hardware or problem.hardware
    small = smaller_passes(step, most_halvings(step))
    away = [] if hardware.machine.packs else [small.with_offloaded(small.roles)]
    for one in (small, *away):
        tried = Problem(one, hardware, count, streaming=problem.streaming, sharding=problem.sharding)
        if _may_fit(tried):
            found = search(tried, seconds=TRY_SECONDS, any_that_fits=True)
            if score(tried, found).excess == 0:
                return True
    return False


def _may_fit(problem: Problem) -> bool:
    """Whether each use fits alone, and all devices together have what roles keep at least."""
    kept = 0
    for use, found in problem.candidates.items():
        away, is_home = problem.step.roles[use.role].offloaded, use == problem.home(use.role)
        least = min((one.kept if is_home or away else one.copy) + max(one.working.values()) for one in found)
        if least > problem.capacity:
            return False
        kept += 0 if away or not is_home else min(one.kept * one.size for one in found)
    return kept <= problem.num_devices * problem.capacity


def _recomputed(step: Step) -> Step:
    return step.with_passes([n for n, role in step.roles.items() if role.trained], gradient_checkpointing=True)


def _adapted(step: Step) -> Step:
    """Trained roles with adapters alone."""

    def change(role: Role) -> Role:
        if not role.trained or role.config.adapter is not None:
            return role
        adapter = adapter_for(role.config, LoraConfig(), role.num_frozen_layers)
        return replace(role, config=replace(role.config, adapter=adapter))

    return replace(step, roles={name: change(role) for name, role in step.roles.items()})


def _without_reference(step: Step) -> Step:
    gone = {call.name for call in step.calls if call.role == "reference"}
    calls = tuple(replace(call, waits=call.waits - gone) for call in step.calls if call.name not in gone)
    return replace(step, roles={n: role for n, role in step.roles.items() if n != "reference"}, calls=calls)
