"""The fork server: a bare interpreter behind the outer wall that makes one child after another, each shut in anew.

It sees no program, no input and no output: they pass through it as open files, for its children to read, so that
no child finds anything of another's in the memory that it begins with. It says how children ended, not what that
means.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshift.rewards.sandbox import jail, wall
from meshift.rewards.sandbox.caught import Caught
from meshift.rewards.sandbox.layers import NAMESPACES, Limits
from meshift.rewards.sandbox.programs import KINDS
from meshift.rewards.sandbox.syscalls import clone, control_process

MAX_FILES = 16
MAX_REQUEST = 1 << 16
READY_S = 20.0  # for a child to shut itself in
OFTEN_IMPORTED = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "math",
    "operator", "random", "re", "statistics", "string", "threading", "typing",
)  # fmt: skip


def main(argument: str) -> None:
    """Build the wall, say `{"ready": true}` or `{"error": ...}`, and serve until the other side is gone."""
    settings = json.loads(argument)
    control = socket.socket(fileno=settings["control"])
    try:
        if settings["build_wall"]:
            wall.build([(source, target) for source, target in settings["binds"]])
        if os.geteuid() == 0 and settings["drop_root"]:
            wall.become(wall.NOBODY)
        control_process(jail.PR_SET_NO_NEW_PRIVS, 1)
        walls = jail.Walls.of_this_process(settings["readable"])
    except OSError as error:
        control.send(json.dumps({"error": str(error)}).encode())
        return
    for name in OFTEN_IMPORTED:
        importlib.import_module(name)
    sys.path += settings["packages"]
    gc.collect()
    gc.freeze()
    control.send(json.dumps({"ready": True}).encode())
    while True:
        message, files, _, _ = socket.recv_fds(control, MAX_REQUEST, MAX_FILES)
        if not message:
            return
        try:
            reply = _run(json.loads(message), files, walls, control)
        except OSError as error:
            reply = {"error": str(error)}
        control.send(json.dumps(reply).encode())


@dataclass(kw_only=True)
class _Child:
    """A process and how far it may go."""

    pid: int
    handle: int  # pidfd
    limits: Limits
    started: float
    setup: int  # a pipe's end: nothing comes by it unless the layers could not be put up
    stopped: str | None = None

    def time_left(self) -> float:
        """Seconds until it can be over a limit at the earliest; not above 0 where it is."""
        wall_s = self.started + self.limits.wall_s - time.monotonic()
        cpu_s = self.limits.cpu_s - time.clock_gettime((~self.pid << 3) | 2)  # the CPU clock of a process
        if min(wall_s, cpu_s) <= 0:
            self.stopped = "cpu" if cpu_s <= 0 else "wall"
        return min(wall_s, cpu_s)

    def end(self) -> dict[str, Any]:
        """Kill it, and all that it started, if it runs; how it ended and what it used."""
        signal.pidfd_send_signal(self.handle, signal.SIGKILL)
        _, status, used = os.wait4(self.pid, 0)
        os.close(self.handle)
        cpu_s = used.ru_utime + used.ru_stime
        peak_bytes = 1024 * used.ru_maxrss
        return {"status": status, "cpu_s": cpu_s, "peak_bytes": peak_bytes, "stopped": self.stopped}


def _run(
    request: Mapping[str, Any], files: Sequence[int], walls: jail.Walls, control: socket.socket
) -> dict[str, Any]:
    """Run the request's processes until the first of them ends."""
    children: list[_Child] = []
    places = list(files)
    try:
        processes = _linked(request, places)
        for process in processes:
            children.append(_start(process, places, walls))
        _close(places)  # or a process would not see that the other end of its pipe is gone
        failed = "".join(_complaint(child) for child in children)
        if not failed:
            _wait(children, control)
    finally:
        _close(places)
        ended = [child.end() for child in children]
    if failed:
        return {"error": failed}
    return {"ended": ended}


def _linked(request: Mapping[str, Any], places: list[int]) -> list[dict[str, Any]]:
    """The processes with both ends of every pipe between them among their files."""
    processes = [dict(process, files=dict(process["files"])) for process in request["processes"]]
    for writer, output, reader, entrance in request["links"]:
        hears, says = os.pipe()
        processes[writer]["files"][output] = len(places)
        processes[reader]["files"][entrance] = len(places) + 1
        places += [says, hears]
    return processes


def _close(places: list[int]) -> None:
    while places:
        os.close(places.pop())


def _wait(children: Sequence[_Child], control: socket.socket) -> None:
    """Until the first process ends, one is over its limits, or nobody waits for the answer any more."""
    poll = select.poll()
    poll.register(children[0].handle, select.POLLIN)
    poll.register(control, select.POLLHUP)
    while (left := min(child.time_left() for child in children)) > 0:
        if poll.poll(1000 * left + 1):
            return


def _start(process: Mapping[str, Any], files: Sequence[int], walls: jail.Walls) -> _Child:
    layers = process["layers"]
    limits = Limits(**process["limits"])
    uid = os.geteuid()
    hears, says = os.pipe()
    pid = clone(jail.FRESH if NAMESPACES in layers else 0)
    if pid == 0:
        _be_child(process, files, says, lambda: jail.enter(walls, limits, layers, uid))
    os.close(says)
    return _Child(pid=pid, handle=os.pidfd_open(pid), limits=limits, started=time.monotonic(), setup=hears)


def _be_child(process: Mapping[str, Any], files: Sequence[int], says: int, shut_in: Callable[[], None]) -> None:
    """Run what is asked for and end: a child never gets back into the server's loop."""
    status = 125
    places = {"setup": says}
    with Caught() as child:
        os.setsid()  # kill(0) reaches a process group whatever namespaces its members are in
        places = _arrange(process["files"], files, says)
        shut_in()
        os.close(places.pop("setup"))
        status = KINDS[process["kind"]](places)
    if child.error is not None and "setup" in places:  # the layers could not be put up
        os.write(places["setup"], f"{type(child.error).__name__}: {child.error}".encode())
    os._exit(status)


def _complaint(child: _Child) -> str:
    """What kept a child from shutting itself in; nothing where it has."""
    ready, _, _ = select.select([child.setup], [], [], READY_S)
    text = os.read(child.setup, 4096).decode() if ready else "it took too long to put up the layers"
    os.close(child.setup)
    return text


STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}


def _arrange(names: Mapping[str, int], files: Sequence[int], says: int) -> dict[str, int]:
    """Leave the process these files alone, the standard ones in their places and the others above them."""
    high = 100
    places = {name: high + i for i, name in enumerate([*names, "setup"])}
    for name, place in places.items():
        os.dup2(says if name == "setup" else files[names[name]], place)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name, place in STANDARD.items():
        os.dup2(places.get(name, nothing), place)
    os.closerange(3, high)
    for name in STANDARD:
        if name in places:
            os.close(places.pop(name))
    os.closerange(high + len(names) + 1, 1 << 16)
    return places


if __name__ == "__main__":
    main(sys.argv[1])
