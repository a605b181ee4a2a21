"""Calls in the run's own process that do not come to an end: said after a minute, ended after half an hour.

It knows nothing of rewards. A call in a process of its own (`timeout_s`) is `worker`'s business.
"""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)
SAID_AFTER_S = 60.0
ENDED_AFTER_S = 1800.0
AGAIN_S = 5.0  # for code that catches everything


class HungError(BaseException):
    """Raised inside a call that took too long; no `except Exception` of its own passes over it.

    `place` is the line it was at.
    """

    def __init__(self, place: str) -> None:
        super().__init__(place)
        self.place = place


@contextmanager
def ended_if_hung(function: Callable[..., Any]) -> Iterator[None]:
    """Raise `HungError` in the body after half an hour, by a timer's signal: where Python code runs or waits.

    Only the main thread hears signals, and only where nobody else uses this one: elsewhere nothing is done.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        yield
        return
    active = True

    def ring(number: int, frame: FrameType | None) -> None:
        if active:
            raise HungError(_place(frame, function))

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, ENDED_AFTER_S, AGAIN_S)
    try:
        yield
    finally:
        active = False
        if signal.getsignal(signal.SIGALRM) is ring:  # else the body has put in its own
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextmanager
def said_if_slow(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Warn when the body has taken a minute, two, four and so on, and of the line that it is at."""
    thread, over, waited = threading.get_ident(), threading.Event(), SAID_AFTER_S

    def watch() -> None:
        total, pause = waited, waited
        while not over.wait(pause):
            place = _place(sys._current_frames().get(thread), function)
            logger.warning(
                f"reward function {name} has been at work for {total:.0f} s{place}; if it hangs, "
                "a timeout_s ends such calls"
            )
            pause, total = total, 2 * total

    threading.Thread(target=watch, daemon=True, name=f"watch {name}").start()
    try:
        yield
    finally:
        over.set()


def _place(frame: FrameType | None, function: Callable[..., Any]) -> str:
    """The innermost line in the function's own file, or nothing where it is not at any."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    own = [
        line for line in traceback.extract_stack(frame) if code is not None and line.filename == code.co_filename
    ]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
