"""What a plan consists of: transfers between ranks, local copies and aliases, kept compactly and read by device.

Nothing is decided here, and nothing moved; `plan.py` makes plans, an executor carries them out.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from meshift.layout.boxes import Box, num_elements, offset_in, shape_of
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.realloc.dtypes import NUM_BYTES, Dtypes


class Route(NamedTuple):
    """`names[first:stop]` of a `Moves`: their part `box` goes from one rank, which holds `held`, to others, which
    want `wanted`. A tuple and not a dataclass, since plans for many ranks have a great many.
    """

    source: int
    targets: tuple[int, ...]
    held: Box
    wanted: Box
    box: Box
    first: int
    stop: int

    @property
    def num_elements(self) -> int:
        """Numbers that the source sends on this route."""
        return num_elements(self.box) * (self.stop - self.first) * len(self.targets)


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Parameters that are cut alike, and their routes: over the wire, and within a device."""

    names: tuple[str, ...]
    wire: tuple[Route, ...]
    local: tuple[Route, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Transfer:
    """A box of one parameter, from a rank of the source placement to one of the target placement.

    `box` is in the whole parameter; `source_offset` and `target_offset` say where it begins in the shards of
    the two ranks. `num_bytes` counts it in the type that is sent (in the target's type if it stays on a device).

    Example: rows 4-7 of an 8 x 6 matrix, from a rank that has all of it to one that has rows 4-7, are
    `Transfer(..., box=((4, 8), (0, 6)), source_offset=(4, 0), target_offset=(0, 0))`.
    """

    name: str
    source: int
    target: int
    box: Box
    source_offset: tuple[int, ...]
    target_offset: tuple[int, ...]
    num_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what moves."""
        return shape_of(self.box)

    @property
    def source_slices(self) -> tuple[slice, ...]:
        """`shard[transfer.source_slices]` is the view to read; it is what `narrow` gives, dim by dim."""
        return _slices(self.source_offset, self.shape)

    @property
    def target_slices(self) -> tuple[slice, ...]:
        """`shard[transfer.target_slices]` is the view to write."""
        return _slices(self.target_offset, self.shape)

    def part(self, box: Box) -> Transfer:
        """The transfer of a smaller box, which lies within this one."""
        return replace(
            self,
            box=box,
            source_offset=_moved(self.source_offset, box, self.box),
            target_offset=_moved(self.target_offset, box, self.box),
            num_bytes=self.num_bytes // num_elements(self.box) * num_elements(box),
        )


@dataclass(frozen=True, kw_only=True)
class Share:
    """One device's part of a plan. Between any two devices, sends and receives are in the same order."""

    sends: tuple[Transfer, ...]
    receives: tuple[Transfer, ...]
    copies: tuple[Transfer, ...]
    aliases: tuple[Transfer, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a model's parameters get from one placement to another.

    `least_peak` are bytes that the busiest rank has to send, whoever sends what. With `mix`, the target becomes
    `rate * source + (1 - rate) * target`, and nothing is aliased.
    """

    source: Placement
    target: Placement
    dtypes: Dtypes
    mix: bool
    moves: tuple[Moves, ...]
    least_peak: int

    @cached_property
    def sent(self) -> tuple[int, ...]:
        """Bytes that each source rank sends."""
        sent = [0] * self.source.layout.num_ranks
        for route in self._wire():
            sent[route.source] += route.num_elements * self.dtypes.wire_size
        return tuple(sent)

    @cached_property
    def received(self) -> tuple[int, ...]:
        """Bytes that each target rank receives."""
        received = [0] * self.target.layout.num_ranks
        for route in self._wire():
            num_bytes = route.num_elements // len(route.targets) * self.dtypes.wire_size
            for target in route.targets:
                received[target] += num_bytes
        return tuple(received)

    @property
    def wire_bytes(self) -> int:
        """Bytes that go from one device to another."""
        return sum(self.sent)

    @property
    def copied_bytes(self) -> int:
        """Bytes that are written from the same device's memory."""
        return self._local_bytes(alias=False)

    @property
    def aliased_bytes(self) -> int:
        """Bytes of the target that are the source's own memory."""
        return self._local_bytes(alias=True)

    @property
    def num_transfers(self) -> int:
        """Transfers over the wire."""
        return sum((route.stop - route.first) * len(route.targets) for route in self._wire())

    @property
    def balance(self) -> float:
        """What the busiest rank sends over the least that is possible (`least_peak`); 1.0 if nothing is sent."""
        return max(self.sent) / self.least_peak if self.wire_bytes else 1.0

    @cached_property
    def num_peers(self) -> tuple[Counter[int], Counter[int]]:
        """For each source rank how many ranks it sends to, and for each target rank how many it hears from."""
        pairs = {(route.source, target) for route in self._wire() for target in route.targets}
        return Counter(source for source, _ in pairs), Counter(target for _, target in pairs)

    def share(self, device: Device) -> Share:
        """What one device sends, receives, copies and aliases; a device of neither mesh has nothing to do."""
        source, target = self.source.mesh.rank_of(device), self.target.mesh.rank_of(device)
        local = [(moves, r) for moves in self.moves for r in moves.local if target in r.targets]
        wire = [(moves, r) for moves in self.moves for r in moves.wire]
        here = [(moves, r._replace(targets=(target,))) for moves, r in wire if target in r.targets]
        return Share(
            sends=tuple(self._transfers([(moves, r) for moves, r in wire if r.source == source])),
            receives=tuple(self._transfers(here)),
            copies=tuple(self._transfers([(m, r) for m, r in local if not self.is_alias(r)], local=True)),
            aliases=tuple(self._transfers([(m, r) for m, r in local if self.is_alias(r)], local=True)),
        )

    def transfers(self) -> Iterator[Transfer]:
        """Every transfer over the wire, of all ranks."""
        yield from self._transfers([(moves, route) for moves in self.moves for route in moves.wire])

    def is_alias(self, route: Route) -> bool:
        """Whether the target may use the source's own memory: same device, box and type, and no mixing."""
        return route.held == route.wanted and self.dtypes.source == self.dtypes.target and not self.mix

    def summary(self) -> dict[str, Any]:
        """What a log says of the plan, as JSON values."""
        return {
            "source": str(self.source),
            "target": str(self.target),
            "dtypes": {"source": self.dtypes.source, "target": self.dtypes.target, "wire": self.dtypes.wire},
            "mix": self.mix,
            "num_parameters": sum(len(moves.names) for moves in self.moves),
            "num_transfers": self.num_transfers,
            "wire_bytes": self.wire_bytes,
            "copied_bytes": self.copied_bytes,
            "aliased_bytes": self.aliased_bytes,
            "balance": round(self.balance, 4),
            "sent": list(self.sent),
            "received": list(self.received),
        }

    def to_json(self) -> str:
        """The whole plan: the summary, and the routes of the parameters that are cut alike."""
        moves = [{"parameters": m.names, "wire": m.wire, "local": m.local} for m in self.moves]
        return json.dumps({**self.summary(), "moves": moves})

    def digest(self) -> str:
        """sha256 of `to_json`: ranks that plan each for themselves compare it before anything is sent."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def _wire(self) -> Iterator[Route]:
        return (route for moves in self.moves for route in moves.wire)

    def _local_bytes(self, *, alias: bool) -> int:
        local = (route for moves in self.moves for route in moves.local if self.is_alias(route) == alias)
        return sum(route.num_elements for route in local) * NUM_BYTES[self.dtypes.target]

    def _transfers(self, routes: Sequence[tuple[Moves, Route]], *, local: bool = False) -> Iterator[Transfer]:
        size = NUM_BYTES[self.dtypes.target] if local else self.dtypes.wire_size
        for moves, route in routes:
            source_offset, target_offset = offset_in(route.box, route.held), offset_in(route.box, route.wanted)
            num_bytes = num_elements(route.box) * size
            for name in moves.names[route.first : route.stop]:
                for target in route.targets:
                    yield Transfer(
                        name=name,
                        source=route.source,
                        target=target,
                        box=route.box,
                        source_offset=source_offset,
                        target_offset=target_offset,
                        num_bytes=num_bytes,
                    )


def _slices(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def _moved(offset: tuple[int, ...], box: Box, within: Box) -> tuple[int, ...]:
    return tuple(start + further for start, further in zip(offset, offset_in(box, within), strict=True))
