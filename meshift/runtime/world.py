"""The processes of a run and their devices, and the outcomes of calls that they send each other, never pickled.

It knows nothing of roles, of graphs, or of who started the processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshift.batch import Batch, Outcome
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.parallel.groups import Peers, new_group


@dataclass(frozen=True, kw_only=True)
class World:
    """All processes, one to a device, seen from the one at `rank`. `ranks` maps each device to its process."""

    rank: int
    ranks: Mapping[Device, int]
    group: dist.ProcessGroup | None = None
    _sent: list[tuple[dist.Work, Tensor]] = field(default_factory=list, compare=False)

    @property
    def device(self) -> Device:
        """This process's."""
        return next(device for device, rank in self.ranks.items() if rank == self.rank)

    @property
    def everybody(self) -> Peers:
        """All processes."""
        ranks = tuple(range(len(self.ranks)))
        return Peers(ranks=ranks, index=self.rank, group=self.group if len(ranks) > 1 else None)

    def members(self, *placements: Placement) -> tuple[int, ...]:
        """The processes that are in any of the placements, in order."""
        return tuple(sorted({self.ranks[d] for placement in placements for d in placement.mesh.devices}))

    def peers(self, members: tuple[int, ...]) -> Peers | None:
        """A group of these processes; None for one that is not of them. Every process of the world calls this."""
        group = new_group(members) if len(members) > 1 else None
        index = members.index(self.rank) if self.rank in members else None
        return None if index is None else Peers(ranks=members, index=index, group=group)

    def send(self, outcome: Outcome, receivers: Iterable[int], tag: int) -> None:
        """Begin to send; `finish` waits until all has gone."""
        receivers = list(receivers)
        if not receivers:
            return
        metrics = json.dumps(dict(outcome.metrics)).encode()
        payload = torch.frombuffer(bytearray(metrics + outcome.batch.to_bytes()), dtype=torch.uint8)
        sizes = torch.tensor([len(metrics), len(payload)], dtype=torch.int64)
        for receiver in receivers:
            for message, own_tag in ((sizes, 2 * tag), (payload, 2 * tag + 1)):
                work = dist.isend(message, receiver, group=self.group, tag=own_tag)
                assert work is not None
                self._sent.append((work, message))

    def receive(self, sender: int | None, tag: int) -> Outcome:
        """What the sender sends with this tag; None: whoever sends first."""
        sizes = torch.empty(2, dtype=torch.int64)
        sender = dist.recv(sizes, sender, group=self.group, tag=2 * tag)
        payload = torch.empty(int(sizes[1]), dtype=torch.uint8)
        dist.recv(payload, sender, group=self.group, tag=2 * tag + 1)
        data = payload.numpy().tobytes()
        split = int(sizes[0])
        return Outcome(batch=Batch.from_bytes(data[split:]), metrics=json.loads(data[:split]))

    def tell(self, order: Any) -> None:
        """Give a value of JSON to all other processes, which `hear` it; process 0 calls this."""
        payload = torch.frombuffer(bytearray(json.dumps(order).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(payload)], dtype=torch.int64), 0, group=self.group)
        dist.broadcast(payload, 0, group=self.group)

    def hear(self) -> Any:
        """What process 0 tells next."""
        size = torch.empty(1, dtype=torch.int64)
        dist.broadcast(size, 0, group=self.group)
        payload = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(payload, 0, group=self.group)
        return json.loads(payload.numpy().tobytes())

    def finish(self) -> None:
        """Wait until everything that was sent has been received."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()
