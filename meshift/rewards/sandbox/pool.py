"""As many servers as work at the same time, and the threads that wait for them.

It knows nothing of problems.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from meshift.rewards.sandbox.launching import Launch
from meshift.rewards.sandbox.probes import Protection
from meshift.rewards.sandbox.slot import Slot

Item = TypeVar("Item")
Result = TypeVar("Result")


class Sandbox:
    """`num_slots` servers (default: one per processor), started when first needed."""

    def __init__(
        self,
        protection: Protection,
        memory_bytes: int,
        num_slots: int | None = None,
        folders: Sequence[str] = (),
    ) -> None:
        launch = Launch(wall=protection.wall, folders=tuple(folders))
        count = num_slots or len(os.sched_getaffinity(0))
        self._slots = [Slot(launch, memory_bytes) for _ in range(count)]
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for slot in self._slots:
            self._free.put(slot)

    def map(self, function: Callable[[Slot, Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function(slot, item)` of every item, in the order given; raises what the first that failed raised."""

        def one(item: Item) -> Result:
            slot = self._free.get()
            try:
                return function(slot, item)
            finally:
                self._free.put(slot)

        with ThreadPoolExecutor(len(self._slots), thread_name_prefix="sandbox") as threads:
            return list(threads.map(one, items))

    def close(self) -> None:
        """End all servers."""
        for slot in self._slots:
            slot.close()
