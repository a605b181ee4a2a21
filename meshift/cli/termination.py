"""SIGTERM as Ctrl-C is: an exception in the main thread, so that a command says what it kept. Schedulers send it.

It knows nothing of commands.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

EXIT_CODE = 128 + signal.SIGTERM
"""A shell's for a process that SIGTERM ended."""


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def raised_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`. Outside the main thread signals cannot be heard."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
