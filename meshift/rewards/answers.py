"""Functions of a completion and its right answer in a process of their own, where the completion may be hostile.

Whatever a completion makes such a function do is a wrong answer. It knows nothing of what an answer is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from meshift.rewards.scores import CallError, Fault, Scores
from meshift.rewards.signatures import Signature
from meshift.rewards.worker import STARTUP_S, ProcessInvoker

TRUTH_S = 10.0  # for a right answer alone, where that is more than a completion has
STOPPED = "stopped"


class AnswerInvoker(ProcessInvoker):
    """Like `ProcessInvoker`, of a verl function that scores one sample: a completion that it hangs or ends its
    process on, or raises for, scores 0, and is `excused`; every one is tried.

    It is a fault only where the right answer does the same to a `plain` completion. The mean of `stopped` is the
    part of completions that were excused.
    """

    def __init__(self, spec: str, signature: Signature, timeout_s: float, plain: str) -> None:
        super().__init__(spec, signature, timeout_s)
        self._plain = plain
        self._sound: set[str] = set()

    def __call__(
        self, calls: Sequence[Mapping[str, Any]], num_samples: int, *, first_only: bool = False
    ) -> Scores:
        """See `Invoker`."""
        values: list[float | None] = [None] * num_samples
        faults: dict[int, Fault] = {}
        excused: dict[int, Fault] = {}
        for index, call in enumerate(calls):
            value = self._outcome(call, index, self.timeout_s)
            if isinstance(value, Fault):
                of_truth = self._fault_of_truth(call, index)
                if of_truth is None:
                    excused[index], value = value, 0.0
                else:
                    faults[index], value = of_truth, None
            values[index] = value
            if first_only and faults:
                break
        stopped = [float(index in excused) for index, value in enumerate(values) if value is not None]
        return Scores(values=values, faults=faults, extras={STOPPED: stopped}, excused=excused)

    def _outcome(self, call: Mapping[str, Any], index: int, limit_s: float) -> float | Fault | None:
        """One sample's value, or what went wrong. Raises `CallError` where the function cannot be loaded."""
        try:
            if not self.worker.is_running:  # a first call takes longer: libraries make their tables in it
                self._ask([{**call, "solution_str": self._plain, "ground_truth": self._plain}], 1, STARTUP_S)
            one = self._ask([call], 1, limit_s, index)
        except CallError as failure:
            if not failure.can_locate:
                raise
            return failure.fault
        return one.faults.get(0, one.values[0])

    def _fault_of_truth(self, call: Mapping[str, Any], index: int) -> Fault | None:
        """What goes wrong with the right answer alone; one that was found sound once is not tried again."""
        truth = json.dumps(call["ground_truth"], sort_keys=True, default=str)
        if truth in self._sound:
            return None
        found = self._outcome({**call, "solution_str": self._plain}, index, max(TRUTH_S, self.timeout_s))
        if isinstance(found, Fault):
            return found
        self._sound.add(truth)
        return None
