"""Watches the processes of a gang: who died, who is silent, and whether any of them still gets on.

A process that is stopped or swapped out says nothing; processes that wait for each other for ever speak, but stay
where they are. Both end the gang with a report: where each process was, and its stack. It starts nothing.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from meshift.errors import LostWorkerError, WorkerError
from meshift.runtime.launch.member import LOST_PEER, Post

STACKS_S = 1.0
"""How long processes are given to write their stacks."""
DEATH_S = 5.0
"""How long to wait for the exit code of a process whose pipe has closed."""
FRAME = re.compile(r'^\s+File "(?P<file>[^"]*meshift/[^"]+)", line (?P<line>\d+) in (?P<name>\S+)', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How long a process may be silent, and how long all of them may stay where they are, in seconds."""

    heartbeat_s: float = 60.0
    hang_s: float = 1800.0


class Watch:
    """What is known of each process: when it was heard last, and since when it is where it is."""

    def __init__(
        self,
        processes: Sequence[BaseProcess],
        posts: Sequence[Post],
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes, self._posts, self._limits, self._clock = processes, posts, limits, clock
        now = clock()
        self._heard = [now] * len(processes)
        self._moved = [now] * len(processes)
        self._phases: list[list[Any]] = [[0, None, None] for _ in processes]
        self._returned: set[int] = set()

    def heard(self, rank: int) -> None:
        """Something came from this process."""
        self._heard[rank] = self._clock()

    def beat(self, rank: int, phase: list[Any]) -> None:
        """It said where it is."""
        if phase != self._phases[rank]:
            self._phases[rank], self._moved[rank] = phase, self._clock()

    def returned(self, rank: int) -> None:
        """It is done, and has nothing more to say."""
        self._returned.add(rank)

    def check(self) -> None:
        """Raise `LostWorkerError` where a process has been silent, or all have stood still, for too long."""
        now = self._clock()
        active = [rank for rank in range(len(self._processes)) if rank not in self._returned]
        for rank in active:
            if now - self._heard[rank] > self._limits.heartbeat_s:
                what = f"process {rank} of the run has not been heard for {now - self._heard[rank]:.0f} s"
                raise self._lost(what, rank)
        if active and now - max(self._moved[rank] for rank in active) > self._limits.hang_s:
            longest = min(active, key=lambda rank: self._moved[rank])
            what = (
                f"no process of the run has gone on for {self._limits.hang_s:.0f} s, process {longest} for longest"
            )
            raise self._lost(what, longest)

    def death_of(self, rank: int) -> WorkerError:
        """Who died, where the pipe of `rank` closed or it could not reach another: the cause before a victim."""
        deadline = time.monotonic() + DEATH_S
        self._processes[rank].join(DEATH_S)
        while True:
            codes = [process.exitcode for process in self._processes]
            killed = [i for i, code in enumerate(codes) if code is not None and code < 0]
            failed = [i for i, code in enumerate(codes) if code not in (None, 0, LOST_PEER) and i not in killed]
            if killed or failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if killed:
            name = signal.Signals(-(codes[killed[0]] or 0)).name
            where = self._place(killed[0])
            return LostWorkerError(
                f"process {killed[0]} of the run was killed by {name} ({where}), and the others were ended"
            )
        first = failed[0] if failed else rank
        how = f"ended with code {codes[first]} (its traceback stands above)"
        return WorkerError(f"process {first} of the run {how}, and the others were ended")

    def _lost(self, what: str, rank: int) -> LostWorkerError:
        stacks = self._stacks()
        frame = FRAME.search(stacks[rank])
        at = "" if frame is None else f", in {frame['name']} at {_short(frame['file'])}:{frame['line']}"
        state = _state_of(self._processes[rank])
        said = f"{what} ({state}; {self._place(rank)}{at}), and all were ended"
        parts = [
            f"process {i}: {_state_of(process)}; {self._place(i)}, since {self._clock() - self._moved[i]:.1f} s; "
            f"last heard {self._clock() - self._heard[i]:.1f} s ago\n{stacks[i] or 'it wrote no stack'}\n"
            for i, process in enumerate(self._processes)
        ]
        return LostWorkerError(said, report=f"{said}\n\n" + "\n".join(parts))

    def _place(self, rank: int) -> str:
        _, step, name = self._phases[rank]
        if step is None:
            return "before its first call"
        return f"in step {step + 1}, {f'call {name}' if name else 'between calls'}"

    def _stacks(self) -> list[str]:
        """What every process writes of its stacks, the innermost frame first; nothing of one that is stopped."""
        for process in self._processes:
            if process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGUSR1)
        time.sleep(STACKS_S)
        return [post.stack_file.read_text(errors="replace") for post in self._posts]


def _state_of(process: BaseProcess) -> str:
    """`running`, `stopped`, ... as Linux says."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "gone" if process.exitcode is not None else "state unknown"
    found = re.search(r"^State:\s+\S+ \((.+)\)", status, re.MULTILINE)
    return found[1] if found else "state unknown"


def _short(file: str) -> str:
    return f"meshift/{file.rpartition('meshift/')[2]}"
