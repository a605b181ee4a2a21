"""What a launcher has to give: processes that are started, heard, looked at and ended. `conduct` needs no more.

It knows nothing of how any of it is done, nor of what the processes compute.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

STACKS_S = 1.0
"""How long processes are given to write their stacks."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a process ended: as it should, killed from outside, failed by itself, or for want of another process.

    `how` goes on from "process 3 of the run": "was killed by SIGKILL".
    """

    kind: Literal["done", "killed", "failed", "deserted"]
    how: str = "returned"


class Gang(Protocol):
    """Processes of one run, by rank."""

    def __len__(self) -> int:
        """How many they are."""

    def start(self) -> None:
        """Start all of them. Whatever was started before it raises is ended by `end`."""

    def hear(self, timeout_s: float) -> Iterable[tuple[int, bytes | None]]:
        """What was said, by whom, waiting for it so long; None: that one has no more to say."""

    def ending(self, rank: int) -> Ending | None:
        """How it ended; None while it runs, as far as is known."""

    def look(self) -> list[tuple[str, str]]:
        """Each one's state, as Linux names it, and its stacks, innermost frame first; no stack of one stopped."""

    def terminate(self) -> None:
        """Pass SIGTERM on to the first. Called by a signal handler: it must not wait."""

    def end(self) -> None:
        """Leave none of them behind."""


def state_of(pid: int) -> str:
    """`running`, `stopped`, ... as Linux says; `gone`."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return "gone" if Path("/proc/self/status").exists() else "state unknown"
    except OSError:
        return "state unknown"
    found = re.search(r"^State:\s+\S+ \((.+)\)", status, re.MULTILINE)
    return found[1] if found else "state unknown"


def stacks_of(pids: Mapping[int, int], stack_files: Mapping[int, Path]) -> dict[int, str]:
    """What every process, by its rank, writes of its stacks when asked to; nothing of one that is stopped."""
    for pid in pids.values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)
    time.sleep(STACKS_S)
    return {rank: _text(stack_files[rank]) for rank in pids}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
