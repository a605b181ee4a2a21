"""What a step lacks on a cluster that it does not fit on, in sentences.

It knows nothing of what would help (`remedies.py`).
"""

from __future__ import annotations

from meshift.planner.planning import Planned
from meshift.planner.timeline import peak_bytes


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
        f"{planned.lacking / gigabyte:.1f} GB too much{_with_all_of(planned)}",
        f"roles keep on a device of theirs: {held}",
    ]


def _with_all_of(planned: Planned) -> str:
    """What the plan that lacks the least sets already."""
    step, asked = planned.problem.step, planned.asked
    away = [name for name, role in step.roles.items() if role.offloaded and not asked.roles[name].offloaded]
    sizes = {
        role.passes.max_tokens_per_micro_batch
        for name, role in step.roles.items()
        if role.passes.max_tokens_per_micro_batch != asked.roles[name].passes.max_tokens_per_micro_batch
    }
    told = [f"with {', '.join(away)} in the host's memory between their calls"] if away else []
    told += [f"with micro-batches of {' or '.join(map(str, sorted(sizes)))} tokens"] if sizes else []
    return f", even {' and '.join(told)}" if told else ""
