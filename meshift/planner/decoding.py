"""The course of a generation: how many sequences are live at each step, and how long they have become.

Continuous batching as `generation/scheduler.py` does it: sequences enter slots in order of arrival, several at a
time. It knows nothing of models or of seconds.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from operator import add

import numpy as np

from meshift.planner.memory import CACHE_STEP
from meshift.planner.workload import Texts, Windows

NUM_SPANS = 48
"""A course is told in so many spans of steps at most."""
ADMISSION_PART = 8
"""While sequences live, others wait until one in so many slots is free (`generation.scheduler.ADMISSION_PART`)."""
DEALS, FEW = 7, 8192
"""Random deals to ranks that are tried for so few sequences; with more, one is as another."""


@dataclass(frozen=True)
class Span:
    """Steps in a row: how many, and means over them of live sequences and of cached tokens that these all see."""

    steps: int
    live: float
    cached: float


@dataclass(frozen=True)
class Course:
    """Of the sequences of one engine. `ended` is the share of sequences that have ended after 0, 1, ... spans."""

    spans: tuple[Span, ...]
    ended: tuple[float, ...]

    @property
    def num_steps(self) -> int:
        """Decode steps until the last sequence ends."""
        return sum(span.steps for span in self.spans)


@lru_cache(maxsize=4096)
def course(
    texts: Texts, count: int, slots: int, ranks: int = 1, windows: Windows = (None,), padded: bool = False
) -> Course:
    """Of the slowest of `ranks` engines, each with `count` of the sequences, in `slots` of its own.

    Where some wait, they are dealt at random, several times: that deal counts which takes neither the longest nor
    the least. Of cached tokens the layers' `windows` are seen, on average. `padded`: each live sequence reads as
    many as there are positions between the first and the last that any of them sees.
    """
    slots = min(slots, count)
    begun, ends = _entered(texts, count, slots, ranks)
    total = int(ends.max())
    live = _over_steps(begun, ends, np.ones(len(begun)), total)
    cached = np.zeros(total)
    for window, num_layers in Counter(windows).items():
        seen = _padded(texts, begun, ends, live, window) if padded else _cached(texts, begun, ends, total, window)
        cached += num_layers / len(windows) * seen
    width = -(-total // NUM_SPANS)
    spans = tuple(
        Span(min(width, total - at), float(live[at : at + width].mean()), float(cached[at : at + width].mean()))
        for at in range(0, total, width)
    )
    # Where none waits, those of all engines have begun at once.
    ended = [float((ends <= at).mean()) if slots < count else 1 - texts.alive(at) for at in range(0, total, width)]
    return Course(spans=spans, ended=(*ended, 1.0))


@lru_cache(maxsize=4096)
def _entered(texts: Texts, count: int, slots: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """The step at which each sequence enters, and that at which it has ended."""
    if slots >= count:
        return np.zeros(count, dtype=int), np.array(texts.of_longest(count, ranks))
    found = []
    for seed in range(DEALS if count * ranks <= FEW else 1):
        dealt = texts.deal(count, ranks, seed)
        found.append(max((max(map(add, starts, n)), starts, n) for n in dealt for starts in [_starts(n, slots)]))
    _, begun, lengths = sorted(found)[len(found) // 2]
    return np.array(begun), np.array(begun) + np.array(lengths)


def _cached(texts: Texts, begun: np.ndarray, ends: np.ndarray, total: int, window: int | None) -> np.ndarray:
    """At each step the tokens that live sequences see: all they have, or so many."""
    least = None if window is None else max(0, ceil(window - texts.prompt))
    full = ends if least is None else np.minimum(ends, begun + least)
    growing = _over_steps(begun, full, np.ones(len(begun)), total)
    cached = growing * (texts.prompt + np.arange(total)) - _over_steps(begun, full, begun, total)
    if window is not None:
        cached += _over_steps(full, ends, np.full(len(begun), float(window)), total)
    return cached


def _padded(texts: Texts, begun: np.ndarray, ends: np.ndarray, live: np.ndarray, window: int | None) -> np.ndarray:
    """At each step live sequences times the positions that `generation.cache.DecodeAttention` reads of each.

    Up to the longest, from where the shortest one's window begins, in whole steps of the cache; prompts are alike.
    """
    total = len(live)
    first, last = np.zeros(total, dtype=int), np.zeros(total, dtype=int)
    for i in np.argsort(-begun, kind="stable") if begun.any() else ():  # the earliest are written last
        first[begun[i] : ends[i]] = begun[i]
    reach = np.ceil((texts.prompt + np.arange(total) - first + 1) / CACHE_STEP) * CACHE_STEP
    if window is None:
        return live * reach
    for i in np.argsort(begun, kind="stable") if begun.any() else ():
        last[begun[i] : ends[i]] = begun[i]
    shortest = texts.prompt + np.arange(total) - last
    skipped = np.maximum(0, shortest + 1 - window) // CACHE_STEP * CACHE_STEP
    return live * (reach - np.where(reach > window, skipped, 0))


def _starts(lengths: Sequence[int], slots: int) -> list[int]:
    """The step at which each sequence enters, in order of arrival."""
    free, now, live, starts = slots, 0, list[int](), list[int]()
    least = slots // ADMISSION_PART
    for length in lengths:
        waiting = len(lengths) - len(starts)
        if not free:
            while live and (live[0] <= now or free < min(waiting, max(1, least))):
                now = max(now, heapq.heappop(live))
                free += 1
        starts.append(now)
        heapq.heappush(live, now + length)
        free -= 1
    return starts


def _over_steps(starts: np.ndarray, ends: np.ndarray, values: np.ndarray, total: int) -> np.ndarray:
    """At each step the sum of the values of those that have started and not ended."""
    change = np.zeros(total + 1)
    np.add.at(change, starts, values)
    np.subtract.at(change, ends, values)
    return change.cumsum()[:total]
