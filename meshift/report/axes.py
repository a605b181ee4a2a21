"""The range of a chart's vertical axis, linear or logarithmic, and where a value lies on it.

It knows nothing of SVG.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshift.report.numbers import log_ticks, short, tick_labels, ticks

MIN_FOR_OUTLIERS = 20
OUTLIER_SPANS = 4.0
"""Values further from the middle nine tenths than this many times their span do not set the range."""
LOG_RATIO = 20.0
"""A logarithmic axis is offered where the largest value is this many times the smallest."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """From `low` to `high`, bottom to top."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """0 at the bottom, 1 at the top; beyond them for values outside."""
        if not self.log:
            return (value - self.low) / (self.high - self.low)
        return math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)

    def labelled_ticks(self) -> list[tuple[float, str]]:
        """Positions from 0 to 1, and their labels."""
        if self.log:
            return [(self.at(tick), short(tick)) for tick in log_ticks(self.low, self.high)]
        marks = ticks(self.low, self.high)
        return [(self.at(mark), label) for mark, label in zip(marks, tick_labels(marks), strict=True)]


def linear_axis(values: np.ndarray) -> Axis:
    """A range that holds the values with a little room, and zero where that costs little; not lone outliers."""
    if not values.size:
        return Axis(low=0.0, high=1.0)
    low, high = _without_outliers(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    bottom, top = low - room, high + room
    if low >= 0 and (bottom < 0 or low < 0.35 * high):
        bottom = 0.0
    if low < 0 and high <= 0 and (top > 0 or high > 0.35 * low):
        top = 0.0
    return Axis(low=bottom, high=top)


def _without_outliers(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if values.size < MIN_FOR_OUTLIERS:
        return low, high
    usual_low, usual_high = (float(q) for q in np.quantile(values, (0.05, 0.95)))
    span = usual_high - usual_low
    if span > 0:
        low = low if usual_low - low <= OUTLIER_SPANS * span else usual_low - 0.5 * span
        high = high if high - usual_high <= OUTLIER_SPANS * span else usual_high + 0.5 * span
    return low, high


def log_axis(values: np.ndarray) -> Axis | None:
    """A logarithmic axis where the values are positive and far apart; None elsewhere."""
    if not values.size or float(values.min()) <= 0:
        return None
    low, high = float(values.min()), float(values.max())
    if high < LOG_RATIO * low:
        return None
    room = (high / low) ** 0.05
    return Axis(low=low / room, high=high * room, log=True)


def num_outside(axis: Axis, values: Sequence[float] | np.ndarray) -> int:
    """How many values lie beyond the axis."""
    return sum(1 for value in values if not axis.low <= value <= axis.high)
