"""Shows how long work goes on that has a limit of time: a bar of its seconds, beside the thread that works.

It knows nothing of the work.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console

from meshift.cli.counting import Counting


class Waiting:
    """To be used in a `with`: shows `what`, seconds that have passed, of at most about so many."""

    def __init__(self, what: str, seconds: float, console: Console | None = None, every: float = 1.0) -> None:
        """`every` is in seconds; tests wait less."""
        self._what, self._most, self._every = what, round(seconds), every
        self._counting = Counting(console)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _show(self) -> None:
        started = time.monotonic()
        with self._counting as counting:
            while not self._ended.wait(self._every):
                counting(self._what, min(round(time.monotonic() - started), self._most - 1), self._most)
