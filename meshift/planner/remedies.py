"""What would make a step fit that does not: changes found by trying them, in a reader's words.

It knows nothing of how good the plans are that would fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from meshift.layout.layout import Layout
from meshift.planner.candidates import Problem
from meshift.planner.search import score, search
from meshift.planner.workload import Role

MOST_DOUBLINGS = 12


def changes_that_fit(problem: Problem, lacking: float) -> Iterator[str]:
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


def _with_roles(problem: Problem, change: Callable[[Role], Role], num_devices: int | None = None) -> Problem:
    roles: Mapping[str, Role] = {name: change(role) for name, role in problem.step.roles.items()}
    step = replace(problem.step, roles=roles)
    count = num_devices or problem.num_devices
    return Problem(step, problem.hardware, count, streaming=problem.streaming, sharding=problem.sharding)


def _fits(problem: Problem) -> bool:
    return score(problem, search(problem, seconds=2.0)).excess == 0


def _checkpointing(role: Role) -> Role:
    return replace(role, passes=role.passes.model_copy(update={"gradient_checkpointing": True}))


def _as_it_is(role: Role) -> Role:
    return role


def _smaller(part: int, role: Role) -> Role:
    most = max(1, role.passes.max_tokens_per_micro_batch // part)
    return replace(role, passes=role.passes.model_copy(update={"max_tokens_per_micro_batch": most}))
