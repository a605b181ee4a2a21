"""How many decoding steps a batch of completions still takes, by the lengths of those that are finished.

It knows nothing of a step's seconds, nor of what is completed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class StepsLeft:
    """Lengths are taken to be those of the finished, with those still growing as known to be longer than they are
    (Kaplan and Meier 1958); beyond the longest that was seen they are taken to reach the limit, so that the last
    completion's end is told at the latest that it can be.
    """

    def __init__(self, *, num_requests: int, num_slots: int, max_new_tokens: int) -> None:
        self._num_requests, self._num_slots = num_requests, num_slots
        self._finished = np.zeros(max_new_tokens + 1)  # how many, by length
        self._num_finished = 0

    def add(self, lengths: Sequence[int]) -> None:
        """These are finished, with so many tokens each."""
        np.add.at(self._finished, np.asarray(lengths, dtype=np.int64), 1)
        self._num_finished += len(lengths)

    def __call__(self, live: Sequence[int]) -> float:
        """Steps until all are finished, where those in slots have so many tokens each.

        Until nothing waits all slots are full, and the last to leave them is the longest of as many new ones; or,
        if that is later, the longest of those that are there now.
        """
        ages = np.asarray(live, dtype=np.int64)
        num_waiting = self._num_requests - self._num_finished - len(ages)
        longer = self._longer_than(ages)
        after = np.cumsum(longer[::-1])[::-1] / longer.clip(np.finfo(float).tiny)  # tokens left, by age
        if not num_waiting:
            return _longest(ages, longer)
        tokens = after[ages].sum() + num_waiting * after[0]
        last = _longest(np.zeros(self._num_slots, dtype=np.int64), longer)
        return max(tokens / self._num_slots - after[0] + last, _longest(ages, longer))

    def _longer_than(self, ages: np.ndarray) -> np.ndarray:
        """The part of all completions with more tokens than 0, 1, ..., the limit."""
        known = np.bincount(ages, minlength=len(self._finished)) + self._finished
        at_risk = np.cumsum(known[::-1])[::-1]
        ends = np.divide(self._finished, at_risk, out=np.zeros_like(self._finished), where=at_risk > 0)
        longer: np.ndarray = np.cumprod(1 - ends)
        longer[-1] = 0.0
        return longer


def _longest(ages: np.ndarray, longer: np.ndarray) -> float:
    """The expected steps until all of these are finished: the sum, over steps, of the chance that one is not."""
    padded = np.concatenate([longer, np.zeros(len(longer))])
    all_ended = np.ones(len(longer))
    for age, count in zip(*np.unique(ages, return_counts=True), strict=True):
        all_ended *= (1 - padded[age : age + len(longer)] / longer[age]) ** count
    return float((1 - all_ended).sum())
