"""One metric through a run, as numbers over steps: windows, noise, smoothing, thinning.

It knows nothing of what a metric means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOW = 0.2
"""`early` and `late` are means over this part of the values, at the beginning and at the end."""
SMOOTHING = 1 / 30
"""Standard deviation of the smoothing kernel, as a part of the number of values."""
CLEAR = 3.0
"""A change counts when it is this many times its standard error."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """From the first fifth of a series to its last: both means, and the standard error of their difference."""

    early: float
    late: float
    error: float

    @property
    def rose(self) -> bool:
        """Whether the last fifth is above the first by more than noise explains."""
        return self.late - self.early > CLEAR * self.error

    @property
    def fell(self) -> bool:
        """Whether the last fifth is below the first by more than noise explains."""
        return self.early - self.late > CLEAR * self.error


class Series:
    """`values[i]` at `steps[i]`, steps ascending; NaN where the run recorded no finite number."""

    def __init__(self, steps: Sequence[int], values: Sequence[float | None]) -> None:
        self.steps = np.array(steps, dtype=np.int64)
        self.values = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
        self.values[~np.isfinite(self.values)] = np.nan

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def is_finite(self) -> np.ndarray:
        """Bool [n]."""
        return np.isfinite(self.values)

    @property
    def finite(self) -> np.ndarray:
        """The values that are numbers, in order."""
        return self.values[self.is_finite]

    @property
    def lost_steps(self) -> list[int]:
        """Steps whose value was NaN or infinite (null in metrics.jsonl)."""
        return [int(step) for step in self.steps[~self.is_finite]]

    @property
    def first(self) -> float:
        """The first finite value, NaN if there is none."""
        return float(self.finite[0]) if self.finite.size else float("nan")

    @property
    def last(self) -> float:
        """The last finite value, NaN if there is none."""
        return float(self.finite[-1]) if self.finite.size else float("nan")

    @property
    def constant(self) -> bool:
        """Whether a curve of it would be a flat line."""
        return bool(self.finite.size == len(self) and np.unique(self.finite).size <= 1)

    def part(self, start: float, stop: float) -> float:
        """Mean of the finite values from one part of the run to another, 0 to 1; at least one value."""
        finite = self.finite
        if not finite.size:
            return float("nan")
        low = min(int(start * finite.size), finite.size - 1)
        return float(finite[low : max(low + 1, int(np.ceil(stop * finite.size)))].mean())

    @property
    def early(self) -> float:
        """Mean of the first fifth."""
        return self.part(0, WINDOW)

    @property
    def late(self) -> float:
        """Mean of the last fifth."""
        return self.part(1 - WINDOW, 1)

    def change(self) -> Change:
        """First fifth against last. The noise of one value is taken from differences of neighbours, robustly:
        1.4826 median |x[i+1] - x[i]| / sqrt(2) is the standard deviation where the noise is normal."""
        finite = self.finite
        if finite.size < 2:
            return Change(early=self.early, late=self.late, error=float("inf"))
        noise = 1.4826 * float(np.median(np.abs(np.diff(finite)))) / np.sqrt(2)
        count = max(1, int(WINDOW * finite.size))
        return Change(early=self.early, late=self.late, error=float(noise * np.sqrt(2 / count)))

    def smoothed(self) -> Series:
        """Each value's neighbourhood, weighted by a normal curve: no lag, and gaps are bridged."""
        deviation = max(1.0, SMOOTHING * len(self))
        reach = int(3 * deviation)
        kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
        known = self.is_finite
        total = np.convolve(np.where(known, self.values, 0.0), kernel)[reach : reach + len(self)]
        weight = np.convolve(known.astype(float), kernel)[reach : reach + len(self)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return Series(self.steps.tolist(), (total / weight).tolist())

    def at_most(self, count: int) -> Series:
        """Evenly spaced points of the series, the first and the last among them."""
        if len(self) <= count:
            return self
        kept = np.unique(np.linspace(0, len(self) - 1, count).round().astype(int))
        return Series(self.steps[kept].tolist(), self.values[kept].tolist())

    def extremes(self, count: int) -> Series:
        """About `count` points of which every low and every high of the series is one."""
        if len(self) <= count:
            return self
        kept: set[int] = {0, len(self) - 1}
        for part in np.array_split(np.arange(len(self)), max(1, count // 2)):
            values = self.values[part]
            if np.isfinite(values).any():
                kept |= {int(part[np.nanargmin(values)]), int(part[np.nanargmax(values)])}
            else:
                kept.add(int(part[0]))
        order = sorted(kept)
        return Series(self.steps[order].tolist(), self.values[order].tolist())
