"""Means with the interval that belongs to them. It knows nothing of what the numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshift.evaluation.estimators import Estimate, mean, share


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean, its 95 % interval, and of how many numbers it is."""

    value: float
    low: float
    high: float
    count: int


def mean_of(numbers: Sequence[float]) -> Mean:
    """Mean and Student's 95 % interval; of one number the interval is that number."""
    return _of(mean(numbers))


def share_of(numbers: Sequence[float]) -> Mean:
    """Mean of numbers from 0 to 1, with Wilson's interval, which stays between these."""
    return _of(share(numbers))


def difference(after: Sequence[float], before: Sequence[float]) -> Mean:
    """The mean difference of numbers that belong together, pair by pair (the same prompt, the same seed)."""
    return mean_of([a - b for a, b in zip(after, before, strict=True)])


def _of(found: Estimate) -> Mean:
    low, high = (found.value if end is None else end for end in (found.low, found.high))
    return Mean(value=found.value, low=low, high=high, count=found.num)
