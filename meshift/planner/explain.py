"""Why a plan is what it is, in sentences with its figures. It knows nothing of how a plan is found."""

from __future__ import annotations

from collections.abc import Iterator

from meshift.planner.evaluate import Event
from meshift.planner.figures import figure
from meshift.planner.footprint import Footprint, footprints, tightest
from meshift.planner.planning import Planned
from meshift.planner.uses import Candidate, Op, Use
from meshift.planner.written import placements_of

NOTABLE = 0.01
"""Parts of a call below this share are not spoken of."""
WORDS = {
    "compute": "computing",
    "decode": "decoding",
    "prefill": "running prompts",
    "tensor": "sums over tensor ranks",
    "pipeline": "rows between stages",
    "bubbles": "stages that wait",
    "data": "gradients over data ranks",
    "gather": "bringing sharded state together",
    "update": "the optimizer",
    "batch": "batches on their way",
    "pack": "packing weights",
    "sums": "putting adapters into weights",
}


def explanation(planned: Planned) -> list[str]:
    """Sentences: of each call, of what runs at the same time, of moves, of memory, and of the proof."""
    calls = [event for event in planned.events if event.kind == "call"]
    return [
        *(_of_call(planned, op) for op in planned.problem.ops if op.kind == "call"),
        *of_slots(planned),
        *_together(calls),
        *_moves(planned),
        tightest(of_calls(planned), planned.problem.capacity),
        of_proof(planned),
    ]


def _of_call(planned: Planned, op: Op) -> str:
    use = op.uses[0]
    spot = planned.choice[use]
    cost = spot.candidate.costs[op.name]
    parts = sorted(cost.parts.items(), key=lambda part: -part[1])
    shares = [
        f"{WORDS[name]} {value / cost.seconds:.0%}" for name, value in parts if value > NOTABLE * cost.seconds
    ]
    others = _alternative(planned, use, spot.candidate, op.name)
    devices = "one device" if spot.candidate.size == 1 else f"{spot.candidate.size} devices"
    return (
        f"{op.name} ({use}) runs as {spot.candidate.layout} on {devices} in "
        f"{figure(cost.seconds)} s: {', '.join(shares)}{others}."
    )


def _alternative(planned: Planned, use: Use, own: Candidate, name: str) -> str:
    """The next best layout on as many devices, and how much longer it takes; or the faster one, and why not."""
    others = [one for one in planned.problem.candidates[use] if one.size == own.size and one.layout != own.layout]
    if not others:
        return ""
    other = min(others, key=lambda one: one.seconds[name])
    ratio = other.seconds[name] / own.seconds[name]
    if ratio >= 1:
        longer = "as long" if f"{ratio:.2f}" == "1.00" else f"{ratio:.2f} times as long"
        return f"; {other.layout}, the next best, takes {longer}"
    needs = other.kept + other.working[name] > own.kept + own.working[name]
    why = "needs more memory" if needs else "costs more in moves or elsewhere in the step"
    return f"; {other.layout} would take {ratio:.2f} times as long, but {why}"


def of_slots(planned: Planned) -> Iterator[str]:
    """Of each generation that decodes fewer sequences at a time than the config says, since more do not fit."""
    for use, spot in planned.choice.items():
        if spot.candidate.slots is None:
            continue
        calls, one = planned.problem.calls(use), spot.candidate
        given = next(call.num_slots for call in planned.asked.calls if call.name == calls[0].name)
        if given != calls[0].num_slots:
            continue  # the plan has more than the config says, or fewer of more
        every = planned.problem.candidate(use, one.layout)
        name = max(calls, key=lambda call: every.working[call.name]).name
        peak = next(event.peak for event in planned.events if event.name == name)
        over = peak + every.working[name] - one.working[name] - planned.problem.capacity
        yield (
            f"{name} decodes {one.slots} sequences at a time on each data rank of {one.layout}, of "
            f"{min(calls[0].num_slots, -(-calls[0].texts.num_sequences // one.layout.data))} that "
            f"generation.num_slots={calls[0].num_slots} allows: with all of them it would need "
            f"{every.working[name] / 1e9:.2f} GB beside the weights, {over / 1e9:.2f} GB more than there is."
        )


def _together(calls: list[Event]) -> Iterator[str]:
    for i, one in enumerate(calls):
        for other in calls[i + 1 :]:
            overlap = min(one.end, other.end) - max(one.start, other.start)
            shorter = min(one.end - one.start, other.end - other.start)
            if overlap > 0.1 * shorter:
                both = f"{one.name} and {other.name}"
                yield f"{both} are on different devices and run {figure(overlap)} s side by side."


def _moves(planned: Planned) -> Iterator[str]:
    moving = [event for event in planned.events if event.kind != "call" and event.end > event.start]
    if moving:
        total = sum(event.end - event.start for event in moving)
        names = ", ".join(f"{event.name} {figure(event.end - event.start, 2)} s" for event in moving)
        yield f"Parameters move for {figure(total)} s, {total / planned.seconds:.1%} of the step: {names}."


def of_calls(planned: Planned) -> dict[str, list[Footprint]]:
    """For each call of the plan, what every device of its mesh holds meanwhile."""
    hardware, placements = planned.problem.hardware, placements_of(planned.problem, planned.choice)
    return {call.name: footprints(planned.step, hardware, placements, call) for call in planned.step.calls}


def of_rivals(planned: Planned) -> Iterator[tuple[str, str]]:
    """Each plan by hand, and how long its step takes, or why it cannot be."""
    for rival in planned.rivals:
        if rival.seconds is None:
            yield rival.name, f"cannot be made of {planned.problem.num_devices:,} devices"
        elif rival.lacking > 0:
            yield rival.name, f"does not fit: {rival.lacking / 1e9:.1f} GB too much on a device"
        else:
            times = f"{rival.seconds / planned.seconds:.2f}"
            beside = "as long as the plan's" if times == "1.00" else f"{times} times the plan's"
            yield rival.name, f"{figure(rival.seconds)} s, {beside}"


def of_proof(planned: Planned) -> str:
    """How far from the best plan this one can be."""
    proof = planned.proof
    if not proof.proven:
        return (
            "Nothing is proven (pip install 'meshift[planner]' for the solver); simple bounds say that no plan "
            f"takes less than {figure(proof.bound)} s."
        )
    among = _among(planned)
    if planned.gap <= 0.002:
        return f"No plan of this model of costs{among} is faster: proven, up to rounding ({planned.gap:.2%})."
    return (
        f"No plan of this model of costs{among} takes less than {figure(proof.bound)} s: this one is within "
        f"{planned.gap:.1%}."
    )


def _among(planned: Planned) -> str:
    """Of which plans a bound is, where there are others: settings and offloading are not searched jointly."""
    problem = planned.problem
    limits = ["aligned meshes"] if problem.is_aligned else []
    if any(role.offloaded for role in problem.step.roles.values()):
        limits.append("these roles offloaded")
    if any(one.key == "max_tokens_per_micro_batch" for one in planned.settings):
        limits.append("these micro-batches")
    return f" with {' and '.join(limits)}" if limits else ""
