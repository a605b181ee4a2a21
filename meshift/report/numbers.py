"""Numbers for readers: rounding to what is worth reading, durations, and the ticks of an axis.

It knows nothing of charts or metrics.
"""

from __future__ import annotations

import math
from itertools import pairwise

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def short(value: float, digits: int = 3) -> str:
    """A number in few characters: `1.89`, `0.0021`, `2.9e-4`, `12,400`; a dash for what is no number."""
    if not math.isfinite(value):
        return DASH
    size = abs(value)
    if size == 0:
        text = "0"
    elif size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{_trimmed(mantissa)}e{int(exponent)}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(size)))
        text = _trimmed(f"{value:,.{decimals}f}")
    return text.replace("-", MINUS)


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(value: float) -> str:
    """A part of one as a percentage."""
    return f"{short(100 * value, 2 if abs(value) < 0.995 else 3)} %"


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4 min 50 s`, `3 h 12 min`."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 100:
        return f"{short(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def counted(count: int, noun: str) -> str:
    """`1 step`, `16 steps`, `1,200 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high, 1, 2 or 5 times a power of ten apart; at least three."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    for multiple in (5, 2, 1):
        step = power * multiple
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first >= 2:
            break
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def whole_ticks(low: int, high: int, count: int = 5) -> list[int]:
    """Round whole numbers from low to high, `low` itself among them where there is room for it."""
    found = sorted({int(tick) for tick in ticks(low, high, count) if tick == int(tick)})
    if not found or found[0] - low > 0.12 * (high - low):
        found.insert(0, low)
    return found


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high, with 2 and 5 times them where they are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(decades) // 4)
    few = len(decades) <= 3
    found = [m * 10.0**d for d in decades if few or d % every == 0 for m in ((1, 2, 5) if few else (1,))]
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def tick_labels(values: list[float]) -> list[str]:
    """All ticks of an axis with the same number of decimals, or all in powers of ten."""
    step = min((abs(b - a) for a, b in pairwise(values)), default=0.0)
    largest = max((abs(v) for v in values), default=0.0)
    if step <= 0 or largest >= 1e6 or step < 1e-4:
        return [short(value) for value in values]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{value:,.{decimals}f}".replace("-", MINUS) for value in values]
