"""Seconds of products, of passes over memory and of messages: by a device's description, or by its profile.

A description gives the roofline (Williams et al. 2009): as long as the products or as the bytes, whichever is
more. Where there is a profile, what was measured stands instead. It knows nothing of layouts or of calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from meshift.planner.hardware import Hardware
from meshift.planner.profile import NEAR, Profile
from meshift.planner.workload import WIDTHS

UPDATE_BYTES = 46
"""Read and written for each trained number: gradient's norm and clipping, AdamW, the rounded weight, zeros."""
LEARNING = {"read": 1, "learn": 4, "pass": 3, "draw": 1}
"""Products of the head's size: logits; in learning slopes, logits again, and its own gradient if it has one."""
ADAPTER_PASSES = {"beside": 2.5, "beside_back": 3.5}
"""Times that inputs and outputs of a layer with an adapter are read or written for it, on average of both. Forward
inputs once, outputs four times (what is added, the sum); back outputs' gradients twice, and inputs five times (the
adapter's part of the gradient, its sum with the matrix's, and for A's own)."""
OPERATIONS = {"beside": 4, "beside_back": 6}
"""Of an adapter, one started after the other: products, scaling, sums."""
LAYER_OPERATIONS = 20
"""Of a layer, about: what `Hardware.layer_delay` starts."""
FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Of a layer: how many, their rank, and numbers for each of it (`width`: inputs and outputs of all)."""

    count: int
    rank: int
    width: float


class Rates(Protocol):
    """Of one process, alone on its device. `width` are the bytes of a number."""

    def layer(self, kind: str, numbers: float, rows: float, more: float, passing: float) -> float:
        """One pass of `rows` through a layer: `more` operations of attention, `passing` bytes of activations."""

    def beside(self, kind: str, adapters: Adapters, rows: float, layer: float) -> float:
        """What a layer's adapters take more (`ADAPTER_PASSES`); `layer` are the numbers that they are beside."""

    def cached(self, seen: float) -> tuple[float, float]:
        """Of `seen` tokens of the cache: those whose attention is in a decode step's `layer`, those to be read."""

    def head(self, kind: str, numbers: float, rows: float, vocabulary: float) -> float:
        """Rows through the head."""

    def over(self, kind: str, amount: float) -> float:
        """A pass over so many numbers (updates) or bytes."""

    def slow(self, kind: str, busy: float) -> float:
        """How many times as long it takes with so many processes of a host at work."""

    @property
    def call(self) -> float:
        """What a call takes beside."""


class Roofline:
    """By description. Processes do not hinder each other: each has its device."""

    call = 0.0

    def __init__(self, hardware: Hardware, dtype: str, width: int) -> None:
        self.hardware, self.width = hardware, width
        self._peak = hardware.flops[dtype] * hardware.compute_share
        self._rate = hardware.memory_rate * hardware.memory_share

    def _products(self, numbers: float, rows: float, more: float = 0.0) -> float:
        return max((2.0 * numbers * rows + more) / self._peak, numbers * self.width / self._rate)

    def layer(self, kind: str, numbers: float, rows: float, more: float, passing: float) -> float:
        """See `Rates`: a backward pass is two forward ones, with half of the products if matrices are frozen."""
        numbers /= 2 if kind == "frozen" else 1
        once = self._products(numbers, rows, more) + passing / self._rate + self.hardware.layer_delay
        return 2 * once if kind in ("backward", "frozen") else once

    def beside(self, kind: str, adapters: Adapters, rows: float, layer: float) -> float:
        """See `Rates`: so narrow, they are as long as what they read and write."""
        both = 1 + (kind == "beside_back")
        operations = both * 2.0 * adapters.rank * adapters.width * rows
        num_bytes = (ADAPTER_PASSES[kind] * rows + both * adapters.rank) * adapters.width * self.width
        started = adapters.count * OPERATIONS[kind] / LAYER_OPERATIONS * self.hardware.layer_delay
        return max(operations / self._peak, num_bytes / self._rate) + started

    def cached(self, seen: float) -> tuple[float, float]:
        """See `Rates`."""
        return seen, seen

    def head(self, kind: str, numbers: float, rows: float, vocabulary: float) -> float:
        """See `Rates`."""
        return LEARNING[kind] * (self._products(numbers, rows) + 3 * FP32 * rows * vocabulary / self._rate)

    def over(self, kind: str, amount: float) -> float:
        """See `Rates`."""
        if kind == "share":
            return 0.0
        passes = {"update": UPDATE_BYTES, "pack": 2}.get(kind, 1)
        return passes * amount / self._rate

    def slow(self, kind: str, busy: float) -> float:
        """See `Rates`."""
        return 1.0


class Measured:
    """By profile, with as many threads as a process of the plan has."""

    def __init__(self, profile: Profile, dtype: str, threads: int) -> None:
        self.profile, self.dtype, self.threads = profile, dtype, threads

    @property
    def call(self) -> float:
        """See `Rates`."""
        return self.profile.call

    def layer(self, kind: str, numbers: float, rows: float, more: float, passing: float) -> float:
        """See `Rates`: what passes is in the rate, and half of a backward pass where frozen was not measured."""
        if kind == "frozen" and not self.profile.has(kind, self.dtype):
            kind, numbers = "backward", numbers / 2
        rate = self.profile.rate(kind, self.dtype, self.threads, numbers, rows)
        return (2.0 * numbers * rows + more) / rate

    def beside(self, kind: str, adapters: Adapters, rows: float, layer: float) -> float:
        """See `Rates`; where none were measured, at the rate of the layer's own products, and passes on top."""
        width = adapters.width
        if self.profile.has(kind, self.dtype):
            return self.profile.adapters(kind, self.dtype, self.threads, width, rows, adapters.rank)
        like = {"beside": "forward", "beside_back": "backward"}[kind]
        passed = self.over("copy", ADAPTER_PASSES[kind] * rows * width * WIDTHS[self.dtype] / 2)
        return (
            2.0 * adapters.rank * width * rows / self.profile.rate(like, self.dtype, self.threads, layer, rows)
            + passed
        )

    def cached(self, seen: float) -> tuple[float, float]:
        """See `Rates`: the first ones were measured with the step, and the others by what they take more."""
        return min(seen, NEAR), max(0.0, seen - NEAR)

    def head(self, kind: str, numbers: float, rows: float, vocabulary: float) -> float:
        """See `Rates`."""
        if rows <= 0:
            return 0.0
        return 2.0 * numbers * rows / self.profile.rate(kind, self.dtype, self.threads, numbers, rows)

    def over(self, kind: str, amount: float) -> float:
        """See `Rates`."""
        return amount / self.profile.speed(kind, self.dtype, self.threads)

    def slow(self, kind: str, busy: float) -> float:
        """See `Rates`."""
        return self.profile.slow(kind, busy)


def rates_of(hardware: Hardware, dtype: str, width: int) -> Rates:
    """The profile's, if the hardware has one."""
    if hardware.profile is None:
        return Roofline(hardware, dtype, width)
    return Measured(hardware.profile, dtype, hardware.threads)
