"""Estimates from samples, with their intervals: pass@k, n@k, means and shares.

It knows nothing of tasks, models or files. numpy and torch are not needed.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist, fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over `num` problems and its 95 % interval; the bounds are None where one value has no spread.

    Example: `Estimate(value=0.5, low=0.24, high=0.76, num=10)`.
    """

    value: float
    low: float | None
    high: float | None
    num: int

    def to_json(self) -> dict[str, float | int | None]:
        """Plain values."""
        return {"value": self.value, "low": self.low, "high": self.high, "num": self.num}


def share(values: Sequence[float]) -> Estimate:
    """The mean of values in [0, 1], one per problem, with Wilson's score interval (Wilson 1927).

    For yes or no it is the usual one. For values between (pass@k, several samples of one problem) it is wider than
    need be: no distribution on [0, 1] of mean p has a larger variance than p (1 - p). It does not collapse where
    all values are equal. Raises `ValueError` where there is none, or one outside [0, 1].
    """
    if not values or not all(0 <= value <= 1 for value in values):
        raise ValueError("a share is of one or more values between 0 and 1")
    num, z = len(values), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    p = fmean(values)
    middle = (p + z * z / (2 * num)) / (1 + z * z / num)
    half = z / (1 + z * z / num) * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    return Estimate(value=p, low=min(p, max(0.0, middle - half)), high=max(p, min(1.0, middle + half)), num=num)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of any numbers, one per problem, with Student's t interval. Raises `ValueError` without any."""
    if not values:
        raise ValueError("a mean is of one or more values")
    middle = fmean(values)
    if len(values) == 1:
        return Estimate(value=middle, low=None, high=None, num=1)
    half = student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(value=middle, low=middle - half, high=middle + half, num=len(values))


def mean_count(counts: Sequence[float]) -> Estimate:
    """The same of what is never below 0, and so neither is the interval."""
    found = mean(counts)
    return found if found.low is None else replace(found, low=max(0.0, found.low))


def student_quantile(degrees: int) -> float:
    """The t above which lies 2.5 % of Student's distribution; from three degrees of freedom on right to 0.2 %.

    One and two degrees have closed forms; the others by the expansion around the normal quantile (Abramowitz and
    Stegun 26.7.5).
    """
    upper = (1 + CONFIDENCE) / 2
    if degrees == 1:
        return math.tan(math.pi * (upper - 0.5))
    if degrees == 2:
        return (2 * upper - 1) * math.sqrt(2 / (4 * upper * (1 - upper)))
    z, n = NormalDist().inv_cdf(upper), degrees
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of a problem's samples, drawn without replacement, hold a correct one.

    1 - C(n - c, k) / C(n, k), the unbiased estimate of pass@k (Chen et al. 2021, eq. 1), as a product of factors
    below 1: no large number arises. Raises `ValueError` where k samples cannot be drawn.
    """
    if not 0 <= k <= num_samples or not 0 <= num_correct <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples, {num_correct} of them correct")
    if num_samples - num_correct < k:
        return 1.0
    wrong = 1.0
    for i in range(num_samples - num_correct + 1, num_samples + 1):
        wrong *= 1 - k / i
    return 1 - wrong


def filtered_n_at_k(num_samples: int, num_kept: int, num_correct: int, *, n: int, k: int) -> float:
    """The chance of solving a problem with n submissions out of k samples of which those are kept that pass its
    public tests (Li et al. 2022, AlphaCode, n@k with filtering). Of the problem's samples `num_kept` pass them,
    and `num_correct` of those are correct.

    Exact: the number m of kept ones among k is hypergeometric, and min(n, m) of them are submitted at random.
    """
    if not 0 <= num_correct <= num_kept <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"{n}@{k} of {num_samples} samples, {num_kept} kept, {num_correct} correct")
    solved = 0.0
    for m in range(max(0, k - (num_samples - num_kept)), min(k, num_kept) + 1):
        solved += _hypergeometric(m, num_samples, num_kept, k) * pass_at_k(num_kept, num_correct, min(n, m))
    return min(1.0, solved)


def _hypergeometric(m: int, total: int, marked: int, drawn: int) -> float:
    """The chance of m marked ones among `drawn` out of `total`."""
    log = _log_choose(marked, m) + _log_choose(total - marked, drawn - m) - _log_choose(total, drawn)
    return math.exp(log)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One program of a problem: whether it passes the public tests, all tests, and what it prints for inputs that
    decide nothing (equal for programs that behave alike)."""

    kept: bool
    correct: bool
    behaviour: Hashable


def clustered_n_at_k(samples: Sequence[Sample], *, n: int, k: int, num_draws: int = 200, seed: int = 0) -> float:
    """As `filtered_n_at_k`, where those that pass are clustered by behaviour, and submissions taken one from each
    cluster, from the largest on, around again where n are not yet reached (Li et al. 2022, section 4.6).

    The mean over `num_draws` random choices of k samples, each with a random order of clusters of one size;
    within a choice the chance is exact. Where k is all samples and no two clusters tie, all draws are the same.
    """
    if not 1 <= k <= len(samples):
        raise ValueError(f"{n}@{k} of {len(samples)} samples")
    draws = random.Random(seed)
    return fmean(_solved(draws.sample(samples, k), n, draws) for _ in range(num_draws))


def _solved(chosen: Sequence[Sample], n: int, draws: random.Random) -> float:
    clusters: dict[Hashable, list[bool]] = defaultdict(list)
    for sample in chosen:
        if sample.kept:
            clusters[sample.behaviour].append(sample.correct)
    order = list(clusters.values())
    draws.shuffle(order)  # among clusters of one size any may be first; the sort keeps this order
    order.sort(key=len, reverse=True)
    wrong = 1.0
    for cluster, count in zip(order, submissions([len(cluster) for cluster in order], n), strict=True):
        wrong *= 1 - pass_at_k(len(cluster), sum(cluster), count)
    return 1 - wrong


def submissions(sizes: Sequence[int], n: int) -> list[int]:
    """How many each cluster submits, of `n` at most: one each, around and around, while it has any left.

    Example: `submissions([3, 1, 1], 4) == [2, 1, 1]`.
    """
    counts = [0] * len(sizes)
    left = min(n, sum(sizes))
    while left:
        for i, size in enumerate(sizes):
            if left and counts[i] < size:
                counts[i] += 1
                left -= 1
    return counts


def by_group(groups: Sequence[str], values: Sequence[float]) -> Mapping[str, list[float]]:
    """The values of each group that has a name, in the order of first appearance."""
    found: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        if group:
            found.setdefault(group, []).append(value)
    return found
