"""Completions that go to other devices while generation goes on: they are read there before the last is drawn.

A call streams where it only reads what a `generate` call writes, on devices of its own. Rows travel in parts, in
the order in which they end; whoever reads them puts them back in the batch's order, so that the outcome is that of
a call on the whole batch. It knows nothing of what is read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from meshift.batch import Batch, Outcome, Ragged
from meshift.graph.calls import Graph, ModelCall
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.world import World

ROWS = "stream/rows"
"""The key of a part's row numbers."""


class Streams:
    """The calls of a graph that stream, and this process's part in them. Without `part_size` none do."""

    def __init__(
        self,
        graph: Graph,
        members: Mapping[str, tuple[int, ...]],
        world: World,
        part_size: int | None,
        first_tag: int,
    ) -> None:
        """`members` are the processes of each call. A part has at least `part_size` rows, the last ones fewer.

        Messages have tags from `first_tag` up to, and without, `end_tag`.
        """
        self._members, self._world, self._part_size = members, world, part_size or 1
        calls = graph.order()
        self._tags = {call.name: first_tag + 2 * i for i, call in enumerate(calls)}
        self.end_tag = first_tag + 2 * len(calls)
        self._sources: dict[str, ModelCall] = {}
        for call in calls if part_size is not None else ():
            for source in calls:
                if _feeds(source, call) and not set(members[source.name]) & set(members[call.name]):
                    assert isinstance(source, ModelCall)
                    self._sources[call.name] = source
        self._readers = {
            name: [c for c in calls if isinstance(c, ModelCall) and self._sources.get(c.name) == source]
            for name, source in {source.name: source for source in self._sources.values()}.items()
        }

    def reads(self, name: str) -> bool:
        """Whether this call reads a stream."""
        return name in self._sources

    def feeds(self, name: str) -> bool:
        """Whether this call writes one."""
        return name in self._readers

    def generate(self, call: ModelCall, role: SpreadRole, batch: Batch) -> Outcome:
        """Generate, and send rows to the readers as they end."""
        readers = [(c, self._members[c.name][0], self._tags[c.name]) for c in self._readers[call.name]]
        sending = _Sending(world=self._world, readers=readers, size=self._part_size)
        outcome = role.generate(call.task, batch.select(call.reads), sending.add)
        sending.flush()
        return outcome

    def infer(self, call: ModelCall, role: SpreadRole, num_rows: int, began: float) -> Outcome:
        """Read every part as it comes; `began` is when the step did. The times are those of the parts."""
        members, tag = self._members[call.name], self._tags[call.name]
        is_first = self._world.rank == members[0]
        rows: list[int] = []
        parts: list[Batch] = []
        busy, started = 0.0, 0.0
        while len(rows) < num_rows:
            came = self._world.receive(None if is_first else members[0], tag if is_first else tag + 1)
            if is_first:
                self._world.send(came, members[1:], tag + 1)
            now = time.perf_counter()
            started = started or now
            rows += came.batch[ROWS].values.tolist()
            parts.append(role.infer(call.task, came.batch.select(call.reads)).batch)
            busy += time.perf_counter() - now
        whole = Batch.concat(parts).index(torch.argsort(torch.tensor(rows)))
        name = call.name
        times = {f"start_s/{name}": started - began, f"timing_s/{name}": busy, f"stream_parts/{name}": len(parts)}
        return Outcome(batch=whole, metrics=times)


@dataclass(kw_only=True)
class _Sending:
    """Rows that have ended, gathered into parts. `readers` are calls, each with a process and a tag."""

    world: World
    readers: list[tuple[ModelCall, int, int]]
    size: int
    _rows: list[int] = field(default_factory=list)
    _waiting: list[Batch] = field(default_factory=list)

    def add(self, rows: list[int], part: Batch) -> None:
        """Some more."""
        self._rows += rows
        self._waiting.append(part)
        if len(self._rows) >= self.size:
            self.flush()

    def flush(self) -> None:
        """Send what is there."""
        if not self._rows:
            return
        numbers = Batch({ROWS: Ragged.scalars(self._rows, torch.int64)})
        whole = Batch.concat(self._waiting)
        for call, receiver, tag in self.readers:
            self.world.send(Outcome(batch=whole.select(call.reads).union(numbers)), [receiver], tag)
        self._rows, self._waiting = [], []


def _feeds(source: object, call: object) -> bool:
    """Whether all that a call reads is what a generation writes."""
    return (
        isinstance(source, ModelCall)
        and isinstance(call, ModelCall)
        and source.kind == "generate"
        and call.kind == "infer"
        and set(call.reads) <= set(source.writes)
    )
