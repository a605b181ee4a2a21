"""Shows how far a command is with things that it counts: a bar, or plain lines where the output is no terminal.

It knows nothing of what is counted.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from meshift.counted import heard_by

SECONDS_BETWEEN_LINES = 5.0
PACE_S, SECONDS_BETWEEN_MARKS = 10.0, 0.5


class Counting:
    """To be used in a `with`, and called in any thread with what is counted, how many are done, of how many, and
    how many of those that are done failed; a total may not be known.

    The first count of a kind is what was done before. With `work` (done and left, in a measure of its own) the
    time that is left is told from the work of the last seconds. `clock` is in seconds; tests give their own.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(file=sys.stderr)
        self._clock = clock
        eta = TextColumn("eta {task.fields[eta]}", markup=False)
        self._bar = bar_on(self._console, eta, transient=True)
        self._lock = threading.Lock()
        self._task: TaskID | None = None
        self._what, self._failed = "", ""
        self._first, self._started, self._last_line = 0, 0.0, 0.0
        self._pace = _Pace()
        self.done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away, until there is something to count again."""
        with self._lock:
            self._bar.stop()
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._what, self._task = "", None

    def __call__(
        self,
        what: str,
        done: int,
        total: int | None,
        failed: int = 0,
        /,
        *,
        work: tuple[float, float] | None = None,
    ) -> None:
        """Show it."""
        with self._lock:
            if what != self._what or done < self.done:
                self._begin(what, done, total)
            self.done = done
            self._pace.note(self._clock(), work)
            self._failed = f", {failed} failed" if failed else ""
            if self._task is not None:
                described = f"{what}{self._failed}"
                self._bar.update(
                    self._task, completed=done, total=total, eta=self._eta(total), description=described
                )
            elif done == total or self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
                self._line(total)

    def _begin(self, what: str, done: int, total: int | None) -> None:
        self._what, self._first, self._started = what, done, self._clock()
        self._last_line = self._started
        self._pace = _Pace()
        if self._console.is_terminal:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total, completed=done, eta="")
            self._bar.start()

    def _eta(self, total: int | None) -> str:
        if total is None:
            return "?"
        if (seconds := self._pace.seconds_left()) is not None:
            return clock_time(seconds)
        if self.done == self._first and self.done < total:
            return "?"
        elapsed = self._clock() - self._started
        return clock_time(elapsed / max(1, self.done - self._first) * (total - self.done))

    def _line(self, total: int | None) -> None:
        self._last_line = self._clock()
        elapsed = clock_time(self._last_line - self._started)
        of = "" if total is None else f"/{total}"
        text = f"{self._what}: {self.done}{of}{self._failed}  elapsed {elapsed}  eta {self._eta(total)}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def counts_shown() -> Iterator[Counting]:
    """What is `counted` inside is shown."""
    with Counting() as counting, heard_by(counting):
        yield counting


class _Pace:
    """How fast work goes now: that of the last `PACE_S` seconds."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, float]] = deque()
        self._left: float | None = None

    def note(self, now: float, work: tuple[float, float] | None) -> None:
        """At this time there was so much done and left."""
        if work is None:
            self._left = None
            return
        done, self._left = work
        if len(self._marks) > 1 and now - self._marks[-2][0] < SECONDS_BETWEEN_MARKS:
            self._marks.pop()
        self._marks.append((now, done))
        while len(self._marks) > 2 and self._marks[1][0] <= now - PACE_S:
            self._marks.popleft()

    def seconds_left(self) -> float | None:
        """None where no pace is known yet."""
        if self._left is None or len(self._marks) < 2:
            return None
        (begun, before), (now, done) = self._marks[0], self._marks[-1]
        return self._left * (now - begun) / (done - before) if done > before else None


def bar_on(console: Console, *more: ProgressColumn, transient: bool = False) -> Progress:
    """What is done of how many and for how long, and `more` behind that; shown on a terminal alone."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *more,
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )


def clock_time(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
