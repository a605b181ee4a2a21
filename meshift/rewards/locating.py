"""Which samples a reward function fails on: a batch is called again one sample at a time, then without those.

It knows nothing of what is done about them. Calling again takes functions without side effects.
"""

from __future__ import annotations

from collections.abc import Callable

from meshift.rewards.samples import Samples
from meshift.rewards.scores import CallError, Fault, Scores
from meshift.rewards.worker import MAX_TIMEOUTS, NOT_TRIED, num_timeouts

Call = Callable[[Samples], Scores]


def score_samples(call: Call, samples: Samples, *, first_only: bool) -> Scores:
    """Scores and faults of every sample, whatever the function does; with `first_only` the first fault suffices.

    Values of samples that the function can score always come from a call on all of these together, since a
    function may compare the completions of a batch. Where no sample can be named, the faults are `of_batch`.
    """
    try:
        return call(samples)
    except CallError as failure:
        faults = _culprits(call, samples, failure, first_only)
        if not faults:
            return Scores.all_failed(len(samples), failure.fault, of_batch=len(samples) > 1)
    rest = [i for i in range(len(samples)) if i not in faults]
    if first_only or not rest:
        return Scores(values=[None] * len(samples), faults=faults)
    try:
        return _merged(call(samples.pick(rest)), rest, faults, len(samples))
    except CallError as failure:
        others = dict.fromkeys(rest, failure.fault)
        return Scores(values=[None] * len(samples), faults=dict(sorted((faults | others).items())))


def _culprits(call: Call, samples: Samples, failure: CallError, first_only: bool) -> dict[int, Fault]:
    """The samples that the call fails on alone, in the same way as on all."""
    faults: dict[int, Fault] = {}
    if len(samples) == 1 or not failure.can_locate:
        return faults
    for index in range(len(samples)):
        if num_timeouts(faults) >= MAX_TIMEOUTS:
            faults[index] = NOT_TRIED
            continue
        fault = _fault_alone(call, samples.pick([index]))
        if fault is not None and fault.kind == failure.fault.kind:
            faults[index] = fault
            if first_only:
                break
    return faults


def _fault_alone(call: Call, sample: Samples) -> Fault | None:
    try:
        return call(sample).faults.get(0)
    except CallError as failure:
        return failure.fault


def _merged(scores: Scores, rows: list[int], faults: dict[int, Fault], num_samples: int) -> Scores:
    """The scores of the samples `rows`, with the faults of the others."""
    values: list[float | None] = [None] * num_samples
    for row, value in zip(rows, scores.values, strict=True):
        values[row] = value
    all_faults = faults | {rows[i]: fault for i, fault in scores.faults.items()}
    return Scores(values=values, faults=dict(sorted(all_faults.items())), extras=scores.extras)
