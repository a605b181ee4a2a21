"""The course of a generation: how many sequences are live at each step, and how long they have become.

Continuous batching as `generation/scheduler.py` does it: sequences enter slots in order of arrival as soon as
slots are free. It knows nothing of models or of seconds.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import numpy as np

from meshift.planner.workload import Texts

NUM_SPANS = 48
"""A course is told in so many spans of steps at most."""


@dataclass(frozen=True)
class Span:
    """Steps in a row: how many, and means over them of live sequences and of cached tokens of all of these."""

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
def course(texts: Texts, count: int, slots: int, seed: int = 0) -> Course:
    """Of `count` sequences of these texts in `slots`; lengths are quantiles of their distribution, shuffled."""
    lengths = texts.lengths(count)
    Random(seed).shuffle(lengths)
    free = [0] * min(slots, count)  # when each slot is free
    starts = []
    for length in lengths:
        start = heapq.heappop(free)
        starts.append(start)
        heapq.heappush(free, start + length)
    begun, counts = np.array(starts), np.array(lengths)
    ends = begun + counts
    total = int(ends.max())
    live = _over_steps(begun, ends, np.ones(count), total)
    since = _over_steps(begun, ends, begun, total)
    cached = live * (texts.prompt + np.arange(total)) - since
    width = -(-total // NUM_SPANS)
    spans = tuple(
        Span(min(width, total - at), float(live[at : at + width].mean()), float(cached[at : at + width].mean()))
        for at in range(0, total, width)
    )
    ended = tuple(float((ends <= at).mean()) for at in range(0, total + width, width))
    return Course(spans=spans, ended=ended)


def _over_steps(starts: np.ndarray, ends: np.ndarray, values: np.ndarray, total: int) -> np.ndarray:
    """At each step the sum of the values of those that have started and not ended."""
    change = np.zeros(total + 1)
    np.add.at(change, starts, values)
    np.subtract.at(change, ends, values)
    return change.cumsum()[:total]
