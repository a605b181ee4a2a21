"""Shows a run on the terminal: a live bar, or plain lines where the output is a file or a pipe.

It knows nothing of runs but what an observer hears.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import TaskID, TextColumn, TimeRemainingColumn

from meshift.cli.counting import SECONDS_BETWEEN_LINES, Counting, bar_on, clock_time

# What is shown of a step's metrics, and under which short name; those that a run does not have are left out.
SHOWN = {
    "reward/mean": "reward",
    "objective/kl": "kl",
    "loss": "loss",
    "mean_token_accuracy": "accuracy",
    "accuracy": "accuracy",
    "eval/loss": "held-out loss",
    "eval/accuracy": "held-out",
}


class RichObserver:
    """An observer on stderr, to be used in a `with`, which gives the terminal back whatever happens.

    `num_done` counts the steps that are done. `clock` is in seconds; tests give their own.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(file=sys.stderr)
        self._clock = clock
        self._bar = bar_on(
            self._console,
            TextColumn("eta"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[reading]}", markup=False),
            TextColumn("{task.fields[call]}", style="dim", markup=False),
        )
        self._counting = Counting(self._console, clock)
        self._task: TaskID | None = None
        self._total = 0
        self._started = 0.0
        self._last_line = float("-inf")
        self._first: int | None = None
        self._in_steps = False
        self.num_done = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._counting.stop()
        self._bar.stop()

    def on_message(self, text: str) -> None:
        """Print the note, above the bar if there is one."""
        self._console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def on_count(self, what: str, done: int, total: int | None) -> None:
        """Before the steps a bar of its own, or lines; within them words beside their bar."""
        if not self._in_steps:
            self._counting(what, done, total)
        elif self._task is not None:
            of = "" if total is None else f"/{total}"
            self._bar.update(self._task, call=f"{what} {done}{of}", refresh=True)

    def on_start(self, total_steps: int, title: str) -> None:
        """Draw the bar, or print the title."""
        self._counting.stop()
        self._in_steps = True
        self._total, self._started, self.num_done = total_steps, self._clock(), 0
        self._last_line, self._first = float("-inf"), None
        if self._console.is_terminal:
            if self._task is not None:  # of a run that begins again after it lost a process
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(title, total=total_steps, reading="", call="")
            self._bar.start()
        else:
            self._line(f"{title}: {total_steps} step{'s' if total_steps != 1 else ''}")

    def on_call(self, step: int, name: str) -> None:
        """Name the call that runs."""
        del step
        if self._task is not None:
            self._bar.update(self._task, call=name)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Advance; show reward and KL, or loss and accuracy."""
        self._first = step if self._first is None else self._first  # not 0 in a run that was resumed
        self.num_done = step + 1
        reading = "  ".join(
            f"{short} {_shown(short, metrics[key])}" for key, short in SHOWN.items() if key in metrics
        )
        if self._task is not None:
            self._bar.update(self._task, completed=self.num_done, reading=reading, call="")
        elif self.num_done == self._total or self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = self._clock()
            self._line(f"step {self.num_done}/{self._total}  {self._times()}  {reading}".rstrip())

    def on_finish(self) -> None:
        """Leave the finished bar standing."""
        self._in_steps = False
        self._bar.stop()

    def _times(self) -> str:
        elapsed = self._clock() - self._started
        remaining = elapsed / (self.num_done - (self._first or 0)) * (self._total - self.num_done)
        return f"elapsed {clock_time(elapsed)}  eta {clock_time(remaining)}"

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _shown(short: str, value: float) -> str:
    """Three digits. KL below 1e-4 is 0: before the first update it is rounding, of either sign."""
    return f"{round(value, 4) + 0.0 if short == 'kl' else value:.3g}"
