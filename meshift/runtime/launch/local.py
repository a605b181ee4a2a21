"""A gang of processes on this machine, one to a device: started, listened to, and ended together.

They come from a forkserver that has torch imported. What they say is JSON over pipes, and what they send each
other goes over loopback. It knows nothing of what they compute.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from meshift import errors
from meshift.errors import MeshiftError, StoppedRunError, WorkerError
from meshift.kernels.library import built
from meshift.runtime.launch.member import Post, run_member
from meshift.runtime.launch.watch import Limits, Watch
from meshift.runtime.observer import Observer

PRELOAD = ["torch", "torch.distributed", "meshift.runtime.spread_run"]
GRACE_S = 300.0
"""How much longer than a hang's limit a process waits for another before it gives up by itself."""


def run_gang(
    num_processes: int, entry: str, argument: str, observer: Observer, limits: Limits | None = None
) -> Any:
    """Run `entry` ("module:function") in every process, until all have returned; gives what process 0 returned.

    Each calls `function(argument, rank, num_processes, observer)`; observers other than that of process 0 are
    heard for their messages only. An error of Meshift's in one process is raised here, as its own class; a
    process that was killed, is silent, or hangs (`limits`) as a `LostWorkerError`; any other end, whose traceback
    that process has printed, as a `WorkerError`. SIGTERM is passed on to process 0, which ends the run after its
    step. No process is left behind.
    """
    built()  # compiled once, not by every process
    limits = limits or Limits()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    with tempfile.TemporaryDirectory(prefix="meshift-") as folder:
        ears: list[Connection] = []
        processes: list[BaseProcess] = []
        posts = [
            Post(
                entry=entry,
                argument=argument,
                rank=rank,
                num_processes=num_processes,
                num_threads=threads,
                timeout_s=limits.hang_s + GRACE_S,
                folder=folder,
            )
            for rank in range(num_processes)
        ]
        try:
            for post in posts:
                ear, mouth = context.Pipe(duplex=False)
                processes.append(context.Process(target=run_member, args=(post, mouth), daemon=True))
                ears.append(ear)
                processes[-1].start()
                mouth.close()
            with _terms_passed_on(processes[0]) as asked:
                try:
                    return _listen(ears, observer, Watch(processes, posts, limits))
                except errors.LostWorkerError as error:
                    if asked:
                        raise StoppedRunError(f"ended by SIGTERM before a step was done ({error})") from None
                    raise
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _listen(ears: Sequence[Connection], observer: Observer, watch: Watch) -> Any:
    """Pass on what is said until everybody has returned."""
    results: dict[int, Any] = {}
    open_ears = {ear: rank for rank, ear in enumerate(ears)}
    while open_ears:
        for ear in wait(list(open_ears), timeout=1.0):
            assert isinstance(ear, Connection)
            rank = open_ears[ear]
            try:
                what, content = json.loads(ear.recv_bytes())
            except EOFError:
                del open_ears[ear]
                if rank not in results:
                    raise watch.death_of(rank) from None
                continue
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
                    raise watch.death_of(rank)
                case _:
                    getattr(observer, what)(*content)
        if not wait(list(open_ears), timeout=0):  # what was said while this process slept has been heard
            watch.check()
    return results[0]


def _error_of(rank: int, name: str, text: str) -> MeshiftError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MeshiftError):
        return kind(text)
    return WorkerError(f"process {rank} of the run failed: {text}")


@contextmanager
def _terms_passed_on(first: BaseProcess) -> Iterator[list[int]]:
    """SIGTERM goes to the first process, and into the list; a second one ends everything now."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        if first.pid is not None and first.is_alive():
            os.kill(first.pid, signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
