"""A cgroup that bounds the memory of one server and its children together, where this process may make one.

Versions 1 and 2. It is a second bound: a program is one process, whose address space is limited anyway.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

NUM_TRIES, PAUSE_S = 100, 0.01  # until an empty group can be removed


@dataclass(frozen=True)
class MemoryGroup:
    """A folder of the cgroup file system."""

    path: Path

    @property
    def members(self) -> str:
        """The file that takes the ids of processes."""
        return str(self.path / "cgroup.procs")

    def remove(self) -> None:
        """After its processes were killed, which takes the kernel a moment."""
        for _ in range(NUM_TRIES):
            try:
                self.path.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(PAUSE_S)
            else:
                return


def make_group(memory_bytes: int) -> MemoryGroup | None:
    """A new group below this process's own, or None where that is not allowed."""
    own = _own_folder()
    if own is None:
        return None
    _sweep(own)
    path = own / f"meshift-{os.getpid()}-{time.monotonic_ns()}"
    try:
        path.mkdir()
    except OSError:
        return None
    group = MemoryGroup(path)
    names = [n for n in ("memory.max", "memory.limit_in_bytes") if (path / n).exists()]
    try:
        (path / names[0]).write_text(str(memory_bytes), encoding="ascii")
        if names[0] == "memory.max":
            with contextlib.suppress(OSError):  # a kernel without swap has no such file
                (path / "memory.swap.max").write_text("0", encoding="ascii")
    except (OSError, IndexError):  # version 2, and the controller is not handed down
        group.remove()
        return None
    return group


def _sweep(folder: Path) -> None:
    """Remove the empty groups of processes that were killed before they could."""
    for path in folder.glob("meshift-*-*"):
        if not Path(f"/proc/{path.name.split('-')[1]}").exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def _own_folder() -> Path | None:
    """Where the memory controller has this process."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for mounted in mounts:
            _, place, kind, options, *_ = mounted.split()
            is_ours = kind == "cgroup2" if not controllers else kind == "cgroup" and "memory" in options.split(",")
            if is_ours and (not controllers or "memory" in controllers.split(",")):
                folder = Path(place + path.rstrip("/"))
                if (folder / "memory.max").exists() or (folder / "memory.limit_in_bytes").exists():
                    return folder
    return None
