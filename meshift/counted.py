"""Long work that tells how far it is, wherever it is done: rows that are read, tensors that are loaded.

It tells whoever was named with `heard_by` around all that it is part of; where nobody was, nothing is told. It
knows nothing of what is counted, nor of how that is shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

T = TypeVar("T")
PATIENCE_S, BETWEEN_S = 2.0, 0.2


class Hears(Protocol):
    """Hears what is counted ("rows of hh.jsonl"), how many are done, and of how many, if that is known."""

    def __call__(self, what: str, done: int, total: int | None, /) -> object:
        """Hear it."""


HEARER: ContextVar[Hears | None] = ContextVar("hearer", default=None)


@contextmanager
def heard_by(hears: Hears) -> Iterator[None]:
    """What is counted inside, in this thread, is told to `hears`."""
    token = HEARER.set(hears)
    try:
        yield
    finally:
        HEARER.reset(token)


class Count:
    """Of one kind of things. It is told once they have taken two seconds: what is shorter needs no bar.

    `total` says how many there are (None: not known), and is asked only if the work is long. `clock` is in
    seconds; tests give their own.
    """

    def __init__(
        self, what: str, total: Callable[[], int | None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._ask, self._clock = what, total, clock
        self._hears = HEARER.get()
        self._begun = self._last = clock()
        self._total: int | None = None
        self._done, self._told = 0, 0

    def to(self, done: int) -> None:
        """So many are done."""
        self._done = done
        if self._hears is None:
            return
        now = self._clock()
        if now - self._begun < PATIENCE_S or now - self._last < BETWEEN_S:
            return
        if not self._told:
            self._total = self._ask()
        self._last, self._told = now, done
        self._hears(self._what, done, self._total)

    def end(self) -> None:
        """There are no more: whoever heard of some hears that all are done."""
        if self._hears is not None and self._told and (self._told, self._total) != (self._done, self._done):
            self._hears(self._what, self._done, self._done)


def counted(
    items: Iterable[T],
    what: str,
    total: Callable[[], int | None] = lambda: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """The items, counted when whoever takes them is done with each; see `Count`."""
    count = Count(what, total, clock)
    for done, item in enumerate(items, start=1):
        yield item
        count.to(done)
    count.end()
