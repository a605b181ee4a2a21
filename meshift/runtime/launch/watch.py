"""Watches the processes of a gang: who died, who is silent, and whether any of them still gets on.

A process that is stopped or swapped out says nothing; processes that wait for each other for ever speak, but stay
where they are. Both end the gang with a report: where each process was, and its stack. It starts nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from meshift.errors import LostWorkerError, WorkerError
from meshift.runtime.launch.gang import Ending, Gang

ASLEEP_S = 5.0
"""Who watches looks every second; after a longer pause it was asleep itself, and nobody else was silent."""
FRAME = re.compile(r'^\s+File "(?P<file>[^"]*meshift/[^"]+)", line (?P<line>\d+) in (?P<name>\S+)', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """In seconds: how long a process may be silent, how long all of them may stay where they are, and how long
    to look for whoever died after others have noticed."""

    heartbeat_s: float = 60.0
    hang_s: float = 1800.0
    death_s: float = 5.0


class Watch:
    """What is known of each process: when it was heard last, and since when it is where it is."""

    def __init__(self, gang: Gang, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._gang, self._limits, self._clock = gang, limits, clock
        self._checked = now = clock()
        self._heard = [now] * len(gang)
        self._moved = [now] * len(gang)
        self._phases: list[list[Any]] = [[0, None, None] for _ in range(len(gang))]
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
        if now - self._checked > ASLEEP_S:
            self._heard = [min(now, at + now - self._checked) for at in self._heard]
            self._moved = [min(now, at + now - self._checked) for at in self._moved]
        self._checked = now
        active = [rank for rank in range(len(self._gang)) if rank not in self._returned]
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

    def death_of(self, rank: int, reason: str = "it lost its connections") -> WorkerError:
        """Who died, where `rank` fell silent or could not reach another (`reason`): the cause before a victim."""
        deadline = time.monotonic() + self._limits.death_s
        while True:
            endings = {i: ending for i in range(len(self._gang)) if (ending := self._gang.ending(i)) is not None}
            killed = [i for i, ending in endings.items() if ending.kind == "killed"]
            failed = [i for i, ending in endings.items() if ending.kind == "failed"]
            if killed or failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
        if killed:
            first = killed[0]
            how = f"{endings[first].how} ({self._place(first)})"
            return LostWorkerError(f"process {first} of the run {how}, and the others were ended")
        if failed:
            return WorkerError(
                f"process {failed[0]} of the run {endings[failed[0]].how}, and the others were ended"
            )
        return LostWorkerError(
            f"process {rank} of the run {endings.get(rank, Ending(kind='deserted', how='cannot go on')).how} "
            f"({self._place(rank)}; {reason}), and all were ended"
        )

    def _lost(self, what: str, rank: int) -> LostWorkerError:
        states, stacks = zip(*self._gang.look(), strict=True)
        frame = FRAME.search(stacks[rank].rpartition("hread 0x")[2])  # the main thread is written last
        at = "" if frame is None else f", in {frame['name']} at {_short(frame['file'])}:{frame['line']}"
        said = f"{what} ({states[rank]}; {self._place(rank)}{at}), and all were ended"
        parts = [
            f"process {i}: {states[i]}; {self._place(i)}, since {self._clock() - self._moved[i]:.1f} s; "
            f"last heard {self._clock() - self._heard[i]:.1f} s ago\n{stacks[i] or 'it wrote no stack'}\n"
            for i in range(len(self._gang))
        ]
        return LostWorkerError(said, report=f"{said}\n\n" + "\n".join(parts))

    def _place(self, rank: int) -> str:
        _, step, name = self._phases[rank]
        if step is None:
            return "before its first call"
        return f"in step {step + 1}, {f'call {name}' if name else 'between calls'}"


def _short(file: str) -> str:
    return f"meshift/{file.rpartition('meshift/')[2]}"
