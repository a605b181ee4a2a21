"""The most memory that was in use in each call of a step: `perf/peak_memory_gb/<call>`.

On a GPU what torch had allocated at most, else what this process had in memory at most, as Linux says. Of several
processes a step tells the largest (`spread_step.py`). It knows nothing of what the calls do.
"""

from __future__ import annotations

from pathlib import Path

import torch

PREFIX = "perf/peak_memory_gb/"
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMeter:
    """Told when a call begins, it knows the peak of the one before; nothing where nothing can be measured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._name: str | None = None
        self._peaks: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """A call begins, and with it the one before has ended."""
        self._settle()
        self._name = name
        self._reset()

    def end(self) -> dict[str, float]:
        """The last call has ended: peaks in GB (10^9 bytes) by `perf/peak_memory_gb/<call>`, forgotten here."""
        self._settle()
        self._name = None
        found, self._peaks = self._peaks, {}
        return found

    def _settle(self) -> None:
        peak = None if self._name is None else self._peak()
        if self._name is not None and peak is not None:
            key = f"{PREFIX}{self._name}"
            self._peaks[key] = max(self._peaks.get(key, 0.0), peak / 1e9)

    def _peak(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _kilobytes("VmHWM")

    def _reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            RESET.write_text("5", encoding="ascii")  # the high-water mark begins at what is in memory now
        except OSError:
            self._name = None  # a peak since the process began would be no call's


def memory_in_use() -> float:
    """Bytes that this process has in memory; 0 where that is not known, or where a GPU is what is measured."""
    return 0.0 if torch.cuda.is_available() else float(_kilobytes("VmRSS") or 0)


def _kilobytes(name: str) -> int | None:
    """A line of this process's status in bytes; None where there is none."""
    try:
        lines = STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
