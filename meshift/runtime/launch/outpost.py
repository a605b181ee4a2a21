"""What runs on the nodes of a cluster: a keeper to each node, which hears its processes, and the processes.

A keeper listens on a socket in a folder that only its user may enter; what is said there is JSON, and so is what
it passes on. It knows nothing of the cluster's software: whoever starts these objects in processes of their own
calls their methods with text and gets text.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import meshift
from meshift.kernels.library import built
from meshift.runtime.launch.gang import stacks_of, state_of
from meshift.runtime.launch.member import PASSED_ON, Post, run_member

GONE = ("gone", "zombie", "dead")
LEAVING_S, KILLED_S = 1.0, 5.0
"""How long a process is given to go by itself, and how long one that was killed is waited for."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a process on another machine needs to find everything as the one that started the run does.

    `shared` are files and folders that every node must see; `token` is a file there, by its path, and its content.
    """

    directory: str
    variables: Mapping[str, str]
    modules: tuple[str, ...]
    shared: tuple[str, ...]
    token: tuple[str, str] | None

    def enter(self) -> None:
        """Go there. Raises `OSError`."""
        os.chdir(self.directory)
        os.environ.update(self.variables)
        sys.path.extend(place for place in self.modules if place not in sys.path)

    def missing(self) -> str | None:
        """What this machine does not see; None: it sees everything."""
        try:
            self.enter()
        except OSError:
            return self.directory
        for path in self.shared:
            if not Path(path).exists():
                return path
        if self.token is not None:
            path, content = self.token
            try:
                found = Path(path).read_text(encoding="ascii")
            except (OSError, ValueError):
                found = ""
            if found != content:
                return str(Path(path).parent)
        return None


class Keeper:
    """The ears on one node: hears its processes, says how they are, and ends them."""

    def __init__(self, silence_s: float) -> None:
        """Where nobody has asked what was said for `silence_s`, it ends its processes and itself."""
        self._folder = tempfile.mkdtemp(prefix="meshift-")
        self._ear = socket.socket(socket.AF_UNIX)
        self._ear.bind(f"{self._folder}/ear")
        self._ear.listen()
        self._lines: dict[Connection, int | None] = {}
        self._pids: dict[int, int] = {}
        self._silence_s = silence_s
        self._asked: float | None = None
        threading.Thread(target=self._end_when_forgotten, daemon=True).start()

    def is_here(self) -> bool:
        """Whether it answers."""
        return True

    def enter(self, surroundings: str) -> str:
        """Look around, and compile what all need. JSON: what is missing, the folder, CPUs, Meshift's version."""
        missing = _read(surroundings).missing()
        if missing is None:
            built()  # once, not by every process
        return json.dumps([missing, self._folder, os.cpu_count() or 1, meshift.__version__])

    def hear(self, timeout_s: float) -> str:
        """JSON: who said what, waiting for it so long; null: that one's line is closed."""
        self._asked = time.monotonic()
        deadline = self._asked + timeout_s
        said: list[tuple[int, str | None]] = []
        while ready := wait([self._ear, *self._lines], 0 if said else max(0.0, deadline - time.monotonic())):
            for one in ready:
                if one is self._ear:
                    line, _ = self._ear.accept()
                    self._lines[Connection(line.detach())] = None
                else:
                    assert isinstance(one, Connection)
                    self._take(one, said)
        return json.dumps(said)

    def look(self) -> str:
        """JSON: rank, state and stacks of each process."""
        pids = dict(self._pids)
        stacks = stacks_of(pids, {rank: Path(self._folder) / f"stack-{rank}.txt" for rank in pids})
        return json.dumps([(rank, state_of(pid), stacks[rank]) for rank, pid in pids.items()])

    def terminate(self, rank: int) -> None:
        """Let one of them end the run after its step."""
        self._kill([pid for own, pid in self._pids.items() if own == rank], PASSED_ON)

    def end(self) -> None:
        """Wait until all have gone, and kill those that have not. The folder goes with them."""
        if not self._gone_in(LEAVING_S):
            self._kill(self._pids.values(), signal.SIGKILL)
            self._gone_in(KILLED_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _gone_in(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while any(state_of(pid) not in GONE for pid in list(self._pids.values())):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def _take(self, line: Connection, said: list[tuple[int, str | None]]) -> None:
        """One message. The first of a line says whose it is."""
        rank = self._lines[line]
        try:
            message = line.recv_bytes().decode()
        except (EOFError, ConnectionError):
            del self._lines[line]
            if rank is not None:
                said.append((rank, None))
            return
        if rank is None:
            rank, pid = json.loads(message)
            self._lines[line], self._pids[rank] = rank, pid
        else:
            said.append((rank, message))

    @staticmethod
    def _kill(pids: Iterable[int], number: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _end_when_forgotten(self) -> None:
        while self._asked is None or time.monotonic() - self._asked < self._silence_s:
            time.sleep(1.0)
        self.end()
        os._exit(1)


class Worker:
    """One process of the run."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def enter(self, surroundings: str, host: str | None) -> int:
        """Go where the run is; with a host, listen on it for the others, who meet this one at the port given."""
        _read(surroundings).enter()
        if host is None:
            return 0
        self._listener = socket.create_server((host, 0))
        return int(self._listener.getsockname()[1])

    def run(self, post: str) -> int:
        """See `run_member`; what it says goes to the keeper in the post's folder."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        told = json.loads(post)
        line = socket.socket(socket.AF_UNIX)
        line.connect(f"{told['folder']}/ear")
        with Connection(line.detach()) as mouth:
            mouth.send_bytes(json.dumps([told["rank"], os.getpid()]).encode())
            return run_member(Post(**told), mouth, None if self._listener is None else self._listener.detach())


def _read(surroundings: str) -> Surroundings:
    values: dict[str, Any] = json.loads(surroundings)
    return Surroundings(**values)
