"""What a process of a gang does from its start to its end: joins the others, runs, and says how it is.

A thread of it says once a second in which step and call it is, so that whoever listens can tell a process that
works from one that is stopped. What it says is JSON. It knows nothing of what is computed.
"""

from __future__ import annotations

import faulthandler
import fcntl
import importlib
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from meshift.counted import heard_by
from meshift.errors import MeshiftError

BEAT_S = 1.0
PASSED_ON = signal.SIGUSR2
"""SIGTERM, as who started the processes passes it on to the first: it ends the run after its step."""
LOST_PEER = 3
"""The exit code of a process that could not reach another: the other is to blame."""
ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR


@dataclass(frozen=True, kw_only=True)
class Post:
    """What a process of a gang is told: what to run, and where it stands.

    `folder` is the gang's own, on this machine, and `gpu` the number of this process's GPU there, if it has one.
    Where there are several machines, `meeting` is the host and the port where all meet, on the machine of rank 0,
    and `host` is this one's own address.
    """

    entry: str
    argument: str
    rank: int
    num_processes: int
    num_threads: int
    timeout_s: float
    folder: str
    gpu: int | None = None
    meeting: tuple[str, int] | None = None
    host: str | None = None

    @property
    def stack_file(self) -> Path:
        """Where the process writes its stacks when it gets SIGUSR1."""
        return Path(self.folder) / f"stack-{self.rank}.txt"


@dataclass(kw_only=True)
class Teller:
    """An observer that says everything to the process that started this one, and what it is at once a second.

    What only the first process says is left out by the others.
    """

    mouth: Connection
    is_first: bool
    _phase: list[Any] = field(default_factory=lambda: [0, None, None])  # a count, the step and the call
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, what: str, content: Any) -> None:
        """One message, whole."""
        with self._lock:
            self.mouth.send_bytes(json.dumps([what, content]).encode())

    def beat(self, ended: threading.Event) -> None:
        """Say what this process is at until it ends. Where nobody listens any more, it ends at once."""
        try:
            while not ended.wait(BEAT_S):
                self.say("beat", self._phase)
        except OSError:
            os._exit(LOST_PEER)

    def on_message(self, text: str) -> None:
        """See `Observer`."""
        self.say("on_message", [text])

    def on_count(self, what: str, done: int, total: int | None) -> None:
        """See `Observer`."""
        self._of_first("on_count", what, done, total)

    def on_start(self, total_steps: int, title: str) -> None:
        """See `Observer`."""
        self._of_first("on_start", total_steps, title)

    def on_call(self, step: int, name: str) -> None:
        """See `Observer`."""
        self._at(step, name)
        self._of_first("on_call", step, name)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer`."""
        self._at(step, None)
        self._of_first("on_step", step, dict(metrics))

    def on_finish(self) -> None:
        """See `Observer`."""
        self._of_first("on_finish")

    def _at(self, step: int, name: str | None) -> None:
        self._phase = [self._phase[0] + 1, step, name]
        self.say("beat", self._phase)

    def _of_first(self, what: str, *content: Any) -> None:
        if self.is_first:
            self.say(what, list(content))


def run_member(post: Post, mouth: Connection, listener: int | None = None) -> int:
    """Join, run `post.entry`, and say what it returned or how it failed; gives the exit code.

    `listener` is a bound socket, where the others meet this process, if it is the first on several machines.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells everybody; who started them decides
    # Whoever ends a group of processes tells each of them: only what the one that started them passes on counts.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    signal.signal(PASSED_ON, _terminate if post.rank == 0 else signal.SIG_IGN)
    teller, ended = Teller(mouth=mouth, is_first=post.rank == 0), threading.Event()
    # Open as long as the process lives: a signal may come after it has returned.
    stacks = os.open(post.stack_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    threading.Thread(target=teller.beat, args=(ended,), daemon=True).start()
    try:
        teller.say("returned", _run(post, teller, listener))
    except MeshiftError as error:
        teller.say("failed", [type(error).__name__, str(error)])
        return 1
    except RuntimeError as error:
        if not any(backend in str(error) for backend in ("gloo", "NCCL")):
            raise
        teller.say("lost", str(error).splitlines()[0])
        return LOST_PEER
    finally:
        ended.set()
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    """What SIGTERM would do, had this process got it itself."""
    do = signal.getsignal(signal.SIGTERM)
    if callable(do):
        do(signal.SIGTERM, frame)
        return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.raise_signal(signal.SIGTERM)


def _run(post: Post, teller: Teller, listener: int | None) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(post.num_threads)
    if post.gpu is not None:
        torch.cuda.set_device(post.gpu)
    dist.init_process_group(
        "gloo" if post.gpu is None else "cpu:gloo,cuda:nccl",
        store=_store(post, listener),
        rank=post.rank,
        world_size=post.num_processes,
        timeout=timedelta(seconds=post.timeout_s),
    )
    if post.gpu is not None:  # NCCL's first call is for all of a group, and later ones are for some
        dist.all_reduce(torch.zeros(1, device="cuda"))
    module, name = post.entry.split(":")
    run = getattr(importlib.import_module(module), name)
    with heard_by(teller.on_count):
        found = run(post.argument, post.rank, post.num_processes, teller)
    dist.barrier()
    dist.destroy_process_group()
    return found


def _store(post: Post, listener: int | None) -> Any:
    """Where the processes find each other: a file on one machine, a server of rank 0 on several."""
    import torch.distributed as dist

    if post.meeting is None:
        return dist.FileStore(str(Path(post.folder) / "store"), post.num_processes)
    if post.host is not None and (interface := interface_of(post.host)) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface  # else gloo listens where the host's name leads
    host, port = post.meeting
    return dist.TCPStore(
        host,
        port,
        post.num_processes,
        is_master=listener is not None,
        timeout=timedelta(seconds=post.timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def interface_of(host: str) -> str | None:
    """The network interface that has this IPv4 address; None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):  # it has no such address
                if socket.inet_ntoa(fcntl.ioctl(asker, ADDRESS_OF_INTERFACE, request)[20:24]) == host:
                    return name
    return None
