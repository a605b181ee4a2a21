"""What the machine is, and what its processors did meanwhile: read from /proc, with Linux's units.

It knows nothing of what is measured.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CLOCK_TICKS = 100.0
"""Ticks a second in /proc; fixed in Linux's ABI for every architecture that we run on."""


@dataclass(frozen=True, kw_only=True)
class CPUTimes:
    """Seconds of all processors since boot: at work, and withheld by the hypervisor."""

    busy: float
    stolen: float


def cpu_times(proc: Path = PROC) -> CPUTimes:
    """The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal."""
    fields = [int(x) for x in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _, _, irq, softirq, steal = fields
    return CPUTimes(busy=(user + nice + system + irq + softirq) / CLOCK_TICKS, stolen=steal / CLOCK_TICKS)


def process_tree(pid: int, proc: Path = PROC) -> list[int]:
    """A process and its living descendants."""
    found, open_ends = [], [pid]
    while open_ends:
        pid = open_ends.pop()
        found.append(pid)
        for task in _tasks(proc / str(pid)):
            open_ends += [int(child) for child in _read(task / "children").split()]
    return found


def cpu_seconds(pids: Iterable[int], proc: Path = PROC) -> float:
    """CPU seconds of processes and of their children that have ended."""
    total = 0
    for pid in pids:
        stat = _read(proc / str(pid) / "stat")
        if stat:
            total += sum(int(x) for x in stat.rpartition(")")[2].split()[11:15])
    return total / CLOCK_TICKS


def peak_memory_gb(pids: Iterable[int], proc: Path = PROC) -> float:
    """The largest resident memory (VmHWM) of each process, summed, in 1e9 bytes."""
    total = 0
    for pid in pids:
        for line in _read(proc / str(pid) / "status").splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total / 1e9


def describe() -> dict[str, object]:
    """The machine for the JSON: processor, cores, memory, system, and the accelerator where there is one."""
    info = {key.strip(): value.strip() for key, _, value in _pairs(_read(PROC / "cpuinfo"))}
    memory = {key.strip(): value.strip() for key, _, value in _pairs(_read(PROC / "meminfo"))}
    known = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor()),
        "cpu_family_model_stepping": [info.get(k, "") for k in ("cpu family", "model", "stepping")],
        "vector_extensions": [flag for flag in known if flag in flags],
        "num_cpus": os.cpu_count(),
        "memory_gb": round(int(memory.get("MemTotal", "0 kB").split()[0]) * 1024 / 1e9, 1),
        "system": platform.platform(),
        "accelerator": accelerator(),
    }


def accelerator() -> str | None:
    """The name of the first NVIDIA GPU, or None."""
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _pairs(text: str) -> list[tuple[str, str, str]]:
    return [line.partition(":") for line in text.splitlines() if ":" in line]


def _tasks(folder: Path) -> list[Path]:
    try:
        return list((folder / "task").iterdir())
    except OSError:  # the process has ended
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended, or this is no Linux
        return ""
