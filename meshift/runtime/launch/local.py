"""A gang of processes on this machine, one to a device: started, listened to, and ended together.

They come from a forkserver that has torch imported. What they say is JSON over pipes, and what they send each
other goes over loopback. It knows nothing of what they compute.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from meshift import errors
from meshift.errors import MeshiftError, WorkerError
from meshift.kernels.library import built
from meshift.runtime.observer import Observer

PRELOAD = ["torch", "torch.distributed", "meshift.runtime.spread_ppo"]
TIMEOUT_S = 1800
"""How long a process waits for another's part in a collective before it gives up."""
PARENT_DIED = 1  # PR_SET_PDEATHSIG

Say = Callable[[str, Any], None]


def run_gang(num_processes: int, entry: str, argument: str, observer: Observer) -> Any:
    """Run `entry` ("module:function") in every process, until all have returned; gives what process 0 returned.

    Each calls `function(argument, rank, num_processes, observer)`; observers other than that of process 0 are
    heard for their messages only. An error of Meshift's in one process is raised here, as its own class; any
    other, whose traceback that process has printed, or a death, as a `WorkerError`. No process is left behind.
    """
    built()  # compiled once, not by every process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    with tempfile.TemporaryDirectory(prefix="meshift-") as folder:
        ears, processes = [], []
        for rank in range(num_processes):
            ear, mouth = context.Pipe(duplex=False)
            arguments = (entry, argument, rank, num_processes, threads, folder, mouth)
            processes.append(context.Process(target=_member, args=arguments, daemon=True))
            ears.append(ear)
            processes[-1].start()
            mouth.close()
        try:
            return _listen(processes, ears, observer)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _listen(processes: Sequence[BaseProcess], ears: list[Connection], observer: Observer) -> Any:
    """Pass on what is said until everybody has returned."""
    results: dict[int, Any] = {}
    open_ears = {ear: rank for rank, ear in enumerate(ears)}
    while open_ears:
        for ear in wait(list(open_ears)):
            assert isinstance(ear, Connection)
            rank = open_ears[ear]
            try:
                what, content = json.loads(ear.recv_bytes())
            except EOFError:
                del open_ears[ear]
                if rank not in results:
                    raise _death_of(processes[rank], rank) from None
                continue
            if what == "returned":
                results[rank] = content
            elif what == "failed":
                raise _error_of(rank, *content)
            else:
                getattr(observer, what)(*content)
    return results[0]


def _error_of(rank: int, name: str, text: str) -> MeshiftError:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, MeshiftError):
        return kind(text)
    return WorkerError(f"process {rank} of the run failed: {text}")


def _death_of(process: BaseProcess, rank: int) -> WorkerError:
    process.join(5)
    code = process.exitcode
    how = (
        f"was killed by {signal.Signals(-code).name}"
        if code is not None and code < 0
        else f"ended with code {code} (its traceback stands above)"
    )
    return WorkerError(f"process {rank} of the run {how}, and the others were ended")


class _Teller:
    """An observer that says everything to the process that started this one."""

    def __init__(self, say: Say, rank: int) -> None:
        self._say, self._first = say, rank == 0

    def on_message(self, text: str) -> None:
        """See `Observer`."""
        self._say("on_message", [text])

    def on_start(self, total_steps: int, title: str) -> None:
        """See `Observer`."""
        self._of_first("on_start", total_steps, title)

    def on_call(self, step: int, name: str) -> None:
        """See `Observer`."""
        self._of_first("on_call", step, name)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer`."""
        self._of_first("on_step", step, dict(metrics))

    def on_finish(self) -> None:
        """See `Observer`."""
        self._of_first("on_finish")

    def _of_first(self, what: str, *content: Any) -> None:
        if self._first:
            self._say(what, list(content))


def _member(
    entry: str, argument: str, rank: int, num_processes: int, threads: int, folder: str, mouth: Connection
) -> None:
    """What a process of the gang does, from its start to its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells everybody; who started them decides
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DIED, signal.SIGKILL)
    import torch
    import torch.distributed as dist

    def say(what: str, content: Any) -> None:
        mouth.send_bytes(json.dumps([what, content]).encode())

    torch.set_num_threads(threads)
    try:
        timeout = timedelta(seconds=TIMEOUT_S)
        store = dist.FileStore(str(Path(folder) / "store"), num_processes)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes, timeout=timeout)
        module, name = entry.split(":")
        run = getattr(importlib.import_module(module), name)
        say("returned", run(argument, rank, num_processes, _Teller(say, rank)))
        dist.barrier()
        dist.destroy_process_group()
    except MeshiftError as error:
        say("failed", [type(error).__name__, str(error)])
        os._exit(1)
