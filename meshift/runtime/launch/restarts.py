"""A gang that loses a process begins again from the run's last checkpoint, a bounded number of times.

It knows nothing of what the processes compute, nor of how they are started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from meshift.config.runs import RunConfig
from meshift.errors import LostWorkerError
from meshift.runtime.observer import Observer
from meshift.runtime.run_folder import HANG

C = TypeVar("C", bound=RunConfig)


def run_with_restarts(config: C, max_restarts: int, run: Callable[[C, Observer], Any], observer: Observer) -> Any:
    """`run(config, observer)`, again with `resume` for each process that was lost, `max_restarts` times at most.

    Where a process hung, what all of them were at is written into the run's folder. A run that was lost before it
    had a folder of its own begins as it was to begin: what lies there may be another run's.
    """
    lost: LostWorkerError | None = None
    for number in range(max_restarts + 1):
        heard = _Begun(observer, Path(config.output_dir), lost)
        try:
            return run(config, heard)
        except LostWorkerError as error:
            lost = error
            told = str(error) + _write_report(Path(config.output_dir), error, has_folder=heard.begun)
            if number == max_restarts:
                after = f" after {number} restart{'s' if number > 1 else ''}" if number else ""
                raise LostWorkerError(f"{told}; the run has ended{after}") from None
            if heard.begun:
                config = config.model_copy(update={"resume": True})
            observer.on_message(f"{told}; starting again ({number + 1} of at most {max_restarts} restarts)")
    raise AssertionError("a run ends")


def _write_report(folder: Path, error: LostWorkerError, *, has_folder: bool) -> str:
    """A sentence's end that names the file; nothing where there is nothing to write, or no place."""
    if error.report is None or not has_folder:
        return ""
    path = folder / HANG
    try:
        path.write_text(error.report, encoding="utf-8")
    except OSError:
        return ""
    return f" ({path} has their stacks)"


class _Begun:
    """Passes everything on, and notes whether the run began.

    The report of what was `lost` before is written again then: a run that begins anew has removed what was there.
    """

    def __init__(self, observer: Observer, folder: Path, lost: LostWorkerError | None) -> None:
        self._observer, self._folder, self._lost = observer, folder, lost
        self.begun = False

    def on_message(self, text: str) -> None:
        """See `Observer`."""
        self._observer.on_message(text)

    def on_count(self, what: str, done: int, total: int | None) -> None:
        """See `Observer`."""
        self._observer.on_count(what, done, total)

    def on_start(self, total_steps: int, title: str) -> None:
        """See `Observer`."""
        self.begun = True
        if self._lost is not None:
            _write_report(self._folder, self._lost, has_folder=True)
        self._observer.on_start(total_steps, title)

    def on_call(self, step: int, name: str) -> None:
        """See `Observer`."""
        self._observer.on_call(step, name)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer`."""
        self._observer.on_step(step, metrics)

    def on_finish(self) -> None:
        """See `Observer`."""
        self._observer.on_finish()
