"""One server as the trusted side holds it: programs, inputs and outputs go to its children as memory files, which
this side reads once the children are dead.

It knows nothing of problems, nor of what a right answer is.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import signal
import socket
import subprocess
import weakref
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshift.errors import RewardError
from meshift.rewards.sandbox.cgroup import MemoryGroup, make_group
from meshift.rewards.sandbox.launching import Launch
from meshift.rewards.sandbox.layers import LAYERS, Limits

START_S = 60.0
GRACE_S = 30.0  # beyond a request's own limits, before its server counts as lost
SERVER_BYTES = 128 * 2**20
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HOME": "/tmp"}
"""All that a server, and so a program, has of it: nothing of the run's own, where secrets may be."""


Link = tuple[int, str, int, str]
"""A pipe: the number of the process that writes, its name there, the one that reads, its name there."""


class SandboxError(RewardError):
    """The sandbox itself failed, not a program in it."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of a request: what it is (`programs.KINDS`), its files by name, its limits and its layers."""

    kind: str
    files: Mapping[str, int]
    limits: Limits
    layers: Collection[str] = LAYERS


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended, and the processor time and memory that it took. `stopped` is "cpu" or "wall" where it
    was over that limit, "server" where it took that with it."""

    status: int
    cpu_s: float
    peak_bytes: int
    stopped: str | None


class Slot:
    """A server that is started when first needed, and anew after it was lost. Not for several threads at once."""

    def __init__(self, launch: Launch, memory_bytes: int) -> None:
        self.launch = launch
        self.has_cgroup = False
        self._memory_bytes = memory_bytes
        self._control: socket.socket | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def run(self, processes: Sequence[Process], links: Sequence[Link] = ()) -> list[Ended]:
        """Run the processes until the first of them ends, then end the others.

        Where they take the server with them, twice, they have ended so; it is known to start without them.
        Raises `SandboxError` where it does not, or layers cannot be put up.
        """
        reply = self._ask(processes, links)
        if reply is None:
            self.close()
            reply = self._ask(processes, links)
        if reply is None:
            self.close()
            self.start()
            return [Ended(status=-1, cpu_s=0.0, peak_bytes=0, stopped="server") for _ in processes]
        if "error" in reply:
            self.close()
            raise SandboxError(f"the sandbox could not run a program: {reply['error']}")
        return [Ended(**one) for one in reply["ended"]]

    def start(self) -> None:
        """Start the server, if it does not run. Raises `SandboxError` with what it says."""
        if self._control is not None:
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        group = make_group(self._memory_bytes + SERVER_BYTES)
        command = self.launch.command(theirs.fileno())
        if group is not None:
            command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', group.members, *command]
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.has_cgroup = group is not None
        self._control = ours
        self._finalizer = weakref.finalize(self, _end, process, ours, group)
        reply = self._hear(START_S)
        if reply is None or "error" in reply:
            said = "" if reply else _last_words(process)
            self.close()
            raise SandboxError(reply["error"] if reply else said or f"no answer within {START_S:g} s")

    def close(self) -> None:
        """End the server and all that runs in it."""
        if self._finalizer is not None:
            self._finalizer()
        self._control = None

    def _ask(self, processes: Sequence[Process], links: Sequence[Link]) -> dict[str, Any] | None:
        self.start()
        assert self._control is not None
        places: dict[int, int] = {}
        for process in processes:
            for place in process.files.values():
                places.setdefault(place, len(places))
        request = {"processes": [_plain(process, places) for process in processes], "links": list(links)}
        files = array.array("i", places)
        try:
            self._control.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
        except OSError:
            return None
        return self._hear(min(p.limits.wall_s for p in processes) + GRACE_S)

    def _hear(self, limit_s: float) -> dict[str, Any] | None:
        """The server's answer, or None where it ends or says nothing."""
        assert self._control is not None
        self._control.settimeout(limit_s)
        try:
            message = self._control.recv(1 << 16)
        except OSError:
            return None
        return dict(json.loads(message)) if message else None


def _plain(process: Process, places: Mapping[int, int]) -> dict[str, Any]:
    return {
        "kind": process.kind,
        "files": {name: places[place] for name, place in process.files.items()},
        "limits": process.limits.to_json(),
        "layers": list(process.layers),
    }


def _end(process: subprocess.Popen[bytes], control: socket.socket, group: MemoryGroup | None) -> None:
    control.close()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
    if group is not None:
        group.remove()


def _last_words(process: subprocess.Popen[bytes]) -> str:
    """What a server that did not come up wrote to stderr."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stderr is not None
    lines = process.stderr.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


class MemoryFile:
    """A file in memory that closes with the block: a program's code, its input, or what it writes."""

    def __init__(self, content: bytes = b"") -> None:
        self.place = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(self.place, rest) :]
        os.lseek(self.place, 0, os.SEEK_SET)

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.place)

    def read(self, most: int) -> bytes:
        """Its first bytes."""
        return os.pread(self.place, most, 0)
