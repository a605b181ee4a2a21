"""The machine's memory, without torch: what is there, and what can be had without swapping.

It knows nothing of models or of GPUs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of the device that a run would use, in bytes.

    Example: `Memory(device="this machine", total=25 << 30, free=20 << 30)`.
    """

    device: str
    total: int
    free: int


def machine_memory() -> Memory:
    """The machine's, within the limit of the container that this process is in."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [limit for path in GROUP_LIMITS if (limit := _number_in(Path(path))) is not None]
    total = min(total, *limits) if limits else total
    return Memory(device="this machine", total=total, free=min(total, _available(total)))


def _available(total: int) -> int:
    """What Linux says can be had without swapping; elsewhere everything."""
    path = Path("/proc/meminfo")
    lines = path.read_text(encoding="ascii").splitlines() if path.is_file() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else total


def _number_in(path: Path) -> int | None:
    """The number in a file; None for `max`, and where there is no such file."""
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
