"""A gang of processes on this machine, one to a device: started, listened to, and ended together.

They come from a forkserver that has torch imported. What they say is JSON over pipes, and what they send each
other goes over loopback. It knows nothing of what they compute.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from meshift.errors import ConfigError
from meshift.kernels.library import built
from meshift.runtime.launch.conduct import GRACE_S, conduct
from meshift.runtime.launch.gang import Ending, stacks_of, state_of
from meshift.runtime.launch.member import LOST_PEER, PASSED_ON, Post, run_member
from meshift.runtime.launch.watch import Limits
from meshift.runtime.observer import Observer

PRELOAD = [
    *("torch", "torch.distributed", "meshift.runtime.spread_run"),
    # What each process would import by itself, for a second or two, when it reads a model's config and tokenizer.
    *("transformers.models.auto.tokenization_auto", "transformers.activations"),
]
PARENT_DIED = 1  # PR_SET_PDEATHSIG
WITH_SERVER = 255
"""The exit code, as multiprocessing gives it, of a process whose forkserver has gone and could not say."""


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
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    gpus = gpus_for(num_processes)
    with tempfile.TemporaryDirectory(prefix="meshift-") as folder:
        posts = [
            Post(
                entry=entry,
                argument=argument,
                rank=rank,
                num_processes=num_processes,
                num_threads=threads,
                timeout_s=limits.hang_s + GRACE_S,
                folder=folder,
                gpu=gpus[rank],
            )
            for rank in range(num_processes)
        ]
        return conduct(LocalGang(posts), observer, limits)


def gpus_for(num_processes: int) -> list[int | None]:
    """The GPU of each process; none where this machine has none. Raises `ConfigError` where it has too few."""
    found = torch.cuda.device_count()
    if not found:
        return [None] * num_processes
    if found < num_processes:
        raise ConfigError(
            f"`plan` has {num_processes} devices, but this machine has {found} GPU{'s' * (found > 1)}; plan for "
            "as many, set launch.launcher=ray for several machines, or hide them with CUDA_VISIBLE_DEVICES= to "
            "run on the CPU"
        )
    return list(range(num_processes))


class LocalGang:
    """See `Gang`. The processes are children of a forkserver, which is a child of this one."""

    def __init__(self, posts: list[Post]) -> None:
        self._posts = posts
        self._processes: list[BaseProcess] = []
        self._ears: dict[Connection, int] = {}

    def __len__(self) -> int:
        return len(self._posts)

    def start(self) -> None:
        """See `Gang`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with _sigterm_held_back():  # else whoever ends a group of processes would end those that serve this one
            forkserver.ensure_running()
        for post in self._posts:
            ear, mouth = context.Pipe(duplex=False)
            process = context.Process(target=_member, args=(post, mouth), daemon=True)
            self._ears[ear] = post.rank
            process.start()
            self._processes.append(process)
            mouth.close()

    def hear(self, timeout_s: float) -> Iterator[tuple[int, bytes | None]]:
        """See `Gang`."""
        for ear in wait(list(self._ears), timeout_s):
            assert isinstance(ear, Connection)
            try:
                message = ear.recv_bytes()
            except EOFError:
                yield self._ears.pop(ear), None
            else:
                yield self._ears[ear], message

    def ending(self, rank: int) -> Ending | None:
        """See `Gang`."""
        code = self._processes[rank].exitcode
        if code is None:
            return None
        if code == WITH_SERVER:
            return Ending(kind="killed", how="was killed, or the process that starts the others was")
        if code < 0:
            return Ending(kind="killed", how=f"was killed by {signal.Signals(-code).name}")
        if code == LOST_PEER:
            return Ending(kind="deserted", how="could not reach another")
        if code > 0:
            return Ending(kind="failed", how=f"ended with code {code} (its traceback stands above)")
        return Ending(kind="done")

    def look(self) -> list[tuple[str, str]]:
        """See `Gang`."""
        pids = {rank: process.pid for rank, process in enumerate(self._processes) if process.pid is not None}
        stacks = stacks_of(pids, {post.rank: post.stack_file for post in self._posts})
        return [(state_of(pids[rank]), stacks[rank]) for rank in range(len(self))]

    def terminate(self) -> None:
        """See `Gang`."""
        first = self._processes[0] if self._processes else None
        if first is not None and first.pid is not None and first.is_alive():
            os.kill(first.pid, PASSED_ON)

    def end(self) -> None:
        """See `Gang`."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


@contextmanager
def _sigterm_held_back() -> Iterator[None]:
    """What is started meanwhile never gets SIGTERM; this process gets it after."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _member(post: Post, mouth: Connection) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
        if os.getppid() == 1:  # it had died before
            os._exit(1)
    code = run_member(post, mouth)
    if code:
        os._exit(code)
