"""Runs a gang from its start to its end: passes on what its processes say, and raises what goes wrong.

It knows nothing of how they are started (`gang.Gang`) or of what they compute.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from meshift import errors
from meshift.errors import MeshiftError, StoppedRunError, WorkerError
from meshift.runtime.launch.gang import Gang
from meshift.runtime.launch.watch import Limits, Watch
from meshift.runtime.observer import Observer

HEAR_S = 1.0
GRACE_S = 300.0
"""How much longer than a hang's limit a process waits for another before it gives up by itself."""


def conduct(gang: Gang, observer: Observer, limits: Limits) -> Any:
    """Start the gang, hear it until all have returned, and give what process 0 returned; none is left behind.

    Raises what `run_gang` says.
    """
    try:
        with _terms_passed_on(gang) as asked:
            try:
                gang.start()
                if asked:  # while there was nobody yet to pass it on to
                    gang.terminate()
                return _listen(gang, observer, Watch(gang, limits))
            except errors.LostWorkerError as error:
                if not asked:
                    raise
                if "SIGTERM" in str(error):
                    raise StoppedRunError(f"ended by SIGTERM before a step was done ({error})") from None
                raise StoppedRunError(
                    f"after SIGTERM {error}; --resume goes on from the last checkpoint, if there is one"
                ) from None
    finally:
        gang.end()


def _listen(gang: Gang, observer: Observer, watch: Watch) -> Any:
    """Pass on what is said until everybody has returned."""
    results: dict[int, Any] = {}
    speaking = set(range(len(gang)))
    while speaking:
        for rank, message in gang.hear(HEAR_S):
            if message is None:
                speaking.discard(rank)
                if rank not in results:
                    raise _cause(gang, watch.death_of(rank))
                continue
            what, content = json.loads(message)
            watch.heard(rank)
            match what:
                case "beat":
                    watch.beat(rank, content)
                case "returned":
                    results[rank] = content
                    watch.returned(rank)
                case "failed":
                    raise _error_of(rank, *content)
                case "lost":
                    raise _cause(gang, watch.death_of(rank, content))
                case _:
                    getattr(observer, what)(*content)
        watch.check()
    return results[0]


def _cause(gang: Gang, death: WorkerError) -> MeshiftError:
    """What ended the gang: an error that one of them told of, and its victims before it could be heard."""
    while heard := list(gang.hear(0.0)):
        for rank, message in heard:
            if message is not None and (told := json.loads(message))[0] == "failed":
                return _error_of(rank, *told[1])
    return death


def _error_of(rank: int, name: str, text: str) -> MeshiftError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MeshiftError):
        return kind(text)
    return WorkerError(f"process {rank} of the run failed: {text}")


@contextmanager
def _terms_passed_on(gang: Gang) -> Iterator[list[int]]:
    """SIGTERM goes to the first process, and into the list; a second one ends everything now."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        gang.terminate()

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
