"""How processes on one machine tell each other that their parameters may be read, and that they have been.

Each has two numbers in memory that the others map, so that one waits only for those it reads from or is read by,
and no message is sent. It knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from meshift.kernels.cpu import Kernels, kernels
from meshift.realloc.near import NearMemory, machine

LOOK_S = 1.0
"""Seconds of one wait; between two of them Python sees whether it has been interrupted."""
_READY, _DONE = 0, 8  # each on a cache line of its own
_FORM = {"numbers": ((16,), torch.int64)}


class Signals:
    """How often this process was ready to be read, and was done with reading; and how often all others were."""

    def __init__(self, numbers: Sequence[Tensor], rank: int, found: Kernels) -> None:
        self._numbers, self._rank, self._kernels = numbers, rank, found
        self._times = 0

    @classmethod
    def open(cls, rank: int, gather: Callable[[Tensor], list[Tensor]]) -> Signals | None:
        """All processes call it together; `gather` gives everybody's tensor of one shape, by rank.

        None, for all of them, where one lacks the kernels or may not map another's memory.
        """
        found, own = kernels(), NearMemory.make(_FORM)
        where = gather(torch.tensor(own.where[1:]))
        numbers: list[Tensor] = []
        try:
            numbers = [NearMemory.open([machine(), *map(int, one)], _FORM)["numbers"] for one in where]
        except (OSError, RuntimeError):  # not allowed here
            found = None
        everywhere = all(bool(one) for one in gather(torch.tensor([found is not None])))
        own.close()
        return cls(numbers, rank, found) if found is not None and everywhere else None

    def ready(self) -> None:
        """This process's parameters may be read, once more, until its readers are done."""
        self._times += 1
        self._set(_READY)

    def done(self) -> None:
        """This process has read all that it wants."""
        self._set(_DONE)

    def await_ready(self, ranks: Iterable[int]) -> None:
        """Until these are ready as often as this process was."""
        self._wait(_READY, ranks)

    def await_done(self, ranks: Iterable[int]) -> None:
        """Until these are done as often as this process was ready."""
        self._wait(_DONE, ranks)

    def _set(self, which: int) -> None:
        self._kernels.set_signal(self._numbers[self._rank][which:], self._times)

    def _wait(self, which: int, ranks: Iterable[int]) -> None:
        waited = [self._numbers[rank][which:] for rank in ranks]
        while not self._kernels.await_signals(waited, self._times, LOOK_S):
            pass  # whoever watches over the processes ends this one where another is lost
