"""Means with the interval that belongs to them. It knows nothing of what the numbers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean, its 95 % interval, and of how many numbers it is."""

    value: float
    low: float
    high: float
    count: int


def mean_of(numbers: Sequence[float]) -> Mean:
    """Mean and Student's interval, mean +- t s / sqrt(n); of one number the interval is that number."""
    count = len(numbers)
    value = fmean(numbers)
    if count < 2:
        return Mean(value=value, low=value, high=value, count=count)
    half = t_quantile(count - 1) * stdev(numbers) / math.sqrt(count)
    return Mean(value=value, low=value - half, high=value + half, count=count)


def difference(after: Sequence[float], before: Sequence[float]) -> Mean:
    """The mean difference of numbers that belong together, pair by pair (the same prompt, the same seed)."""
    return mean_of([a - b for a, b in zip(after, before, strict=True)])


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The two-sided quantile of Student's t.

    Exact for 1 and 2 degrees of freedom, else Abramowitz and Stegun 26.7.5 (within 1 % from 3 on).
    """
    share = (1.0 + level) / 2
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
