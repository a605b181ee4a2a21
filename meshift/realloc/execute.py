"""Carries out plans of reallocation: one process per device, point to point, and a proof of what arrived.

It decides nothing that the plan does not say, and knows nothing of models, roles or of who starts processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from meshift.errors import ReallocationError
from meshift.layout.boxes import Box, boxes_of, shape_of
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.layout.shard import Shard
from meshift.realloc.copies import Copies, place_of
from meshift.realloc.fingerprint import fingerprint
from meshift.realloc.near import Form
from meshift.realloc.rounds import Round, rounds_of
from meshift.realloc.signals import Signals
from meshift.realloc.transfers import Plan, Transfer

Shards = Mapping[str, Tensor]
MAX_BYTES = 512 * 2**20
"""What waits to be sent or stored on a device at a time, unless said otherwise."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where this process stands: its device, and for every device of a plan its process's rank in the world.

    `group` (None: all processes) must contain them; each of its processes takes part in every call.
    """

    device: Device
    ranks: Mapping[Device, int]
    group: dist.ProcessGroup | None = None
    torch_device: str = "cpu"
    max_bytes: int = MAX_BYTES


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """The target's shards on this device by name (none where it is not in the target's mesh), and the cost."""

    shards: dict[str, Tensor]
    sent_bytes: int
    received_bytes: int
    seconds: float


class Reallocation:
    """One plan at one site, read once and carried out as often as the parameters move.

    Where all processes are on one machine and the source's shards lie in memory that they have mapped (`near.py`),
    `near` has them by the source's rank: then receivers copy from there, and nothing is sent.
    """

    near: Mapping[int, Shards] | None = None

    def __init__(self, plan: Plan, shards: Mapping[str, Shard], site: Site) -> None:
        self.plan, self.site = plan, site
        self._table = shards
        self._wire: torch.dtype = getattr(torch, plan.dtypes.wire)
        self._share = plan.share(site.device)
        self._rounds: tuple[Round, ...] = rounds_of(plan, site.device, site.max_bytes)
        names = {name for moves in plan.moves for name in moves.names}
        self._names = [name for name in shards if name in names]
        self._from_here, self._from_near = Copies(), Copies()
        self._held = self._boxes(plan.source)
        self._wanted = self._boxes(plan.target)
        sides = (self._held, self._wanted)
        self._shapes = tuple({name: shape_of(box) for name, box in boxes.items()} for boxes in sides)

    def agree(self) -> None:
        """Compare the plan with everybody's. Raises `ReallocationError` where one is of other arguments."""
        own = torch.frombuffer(bytearray.fromhex(self.plan.digest()), dtype=torch.uint8)
        for rank, other in enumerate(self._gathered(own)):
            if not torch.equal(own, other):
                raise ReallocationError(
                    f"Process {rank} has another plan for {self._path()} than device {self.site.device}: start "
                    "all processes with the same config and version."
                )

    @torch.no_grad()
    def run(self, held: Shards, into: Shards | None = None, rate: float | None = None) -> Arrived:
        """Move: `held` are the source's shards on this device, `into` memory for the target's, new unless given.

        With a plan that mixes, `into <- rate * source + (1 - rate) * into`, and both are needed. Aliased
        parameters are `held`'s own tensors. `into` must not be `held`'s memory. Raises `ValueError` for tensors of
        another shape or type than the plan's.
        """
        self._check(held, into, rate)
        started = time.perf_counter()
        new = self._memory(held, into)
        if self.near is not None:
            self._move_near(self.near, held, new, rate)
        else:
            self._copy(self._from_here, [(copy, held) for copy in self._share.copies], new, rate)
            for part in self._rounds:
                self._exchange(part, held, new, rate)
        sent = sum(transfer.num_bytes for transfer in self._share.sends)
        received = sum(transfer.num_bytes for transfer in self._share.receives)
        seconds = time.perf_counter() - started
        return Arrived(shards=new, sent_bytes=sent, received_bytes=received, seconds=seconds)

    def verify(self, held: Shards, arrived: Shards) -> None:
        """Compare fingerprints of what was sent and what is there, on all devices; not for a plan that mixes.

        Raises `ReallocationError`, on every process, with the parameter and the devices that hold it.
        """
        dtype = getattr(torch, self.plan.dtypes.target)
        sides = (
            self._fingerprints({name: held[name].to(dtype) for name in self._held}, self._held),
            self._fingerprints({name: arrived[name] for name in self._wanted}, self._wanted),
        )
        tables = self._gathered(torch.stack(sides))
        for i, name in enumerate(self._names):
            before = [tables[self._rank(self.plan.source, ranks[0])][0, i] for ranks in self._cells[0][name]]
            after = [
                [tables[self._rank(self.plan.target, r)][1, i] for r in ranks] for ranks in self._cells[1][name]
            ]
            copies_agree = all(torch.equal(copy, copies[0]) for copies in after for copy in copies)
            sent, there = torch.stack(before).sum(0), torch.stack([copies[0] for copies in after]).sum(0)
            if not copies_agree or not torch.equal(sent, there):
                raise ReallocationError(
                    f"After {self._path()} the parameter {name} is not what was sent (devices "
                    f"{self.plan.target.mesh}): the step was stopped; resume from the last checkpoint."
                )

    def senders(self) -> dict[int, Form]:
        """The ranks of the source that this device receives from, each with the form of what it holds."""
        dtype = getattr(torch, self.plan.dtypes.source)
        return {
            rank: {
                n: (shape_of(b), dtype) for n, b in boxes_of(self.plan.source.layout, self._table, rank).items()
            }
            for rank in sorted({transfer.source for transfer in self._share.receives})
        }

    def _move_near(self, near: Mapping[int, Shards], held: Shards, new: Shards, rate: float | None) -> None:
        """Copy what is here, and what would be received from where it lies, while nobody changes it."""
        signals = self._signals
        if signals is None:
            dist.barrier(group=self.site.group)
        else:
            signals.ready()
        self._copy(self._from_here, [(copy, held) for copy in self._share.copies], new, rate)
        if signals is not None:
            signals.await_ready(self._givers)
        self._copy(self._from_near, [(t, near[t.source]) for t in self._share.receives], new, rate)
        if signals is None:
            dist.barrier(group=self.site.group)
        else:
            signals.done()
            signals.await_done(self._takers)

    @cached_property
    def _givers(self) -> set[int]:
        """Who has what this device receives, as ranks in the group."""
        return {self._rank(self.plan.source, rank) for rank in {t.source for t in self._share.receives}}

    @cached_property
    def _takers(self) -> set[int]:
        """Who receives what this device has, as ranks in the group."""
        return {self._rank(self.plan.target, rank) for rank in {t.target for t in self._share.sends}}

    @cached_property
    def _signals(self) -> Signals | None:
        """Made when parameters move for the first time, by all processes."""
        return Signals.open(dist.get_rank(self.site.group), self._gathered)

    def _copy(
        self,
        copies: Copies,
        transfers: Sequence[tuple[Transfer, Shards]],
        new: Shards,
        rate: float | None,
    ) -> None:
        """Write boxes from memory that is here, each with the shards it comes from.

        By way of the type that is sent, lest replicas that mix differ by how their numbers came.
        """
        as_it_is = rate is None and self.plan.dtypes.source == self.plan.dtypes.wire == self.plan.dtypes.target
        targets = [new[transfer.name] for transfer, _ in transfers]
        place = place_of([*targets, *(held[transfer.name] for transfer, held in transfers)]) if as_it_is else None
        if place and copies.again(place, targets):
            return
        data = [held[transfer.name][transfer.source_slices].to(self._wire) for transfer, held in transfers]
        views = [new[transfer.name][transfer.target_slices] for transfer, _ in transfers]
        if rate is None:
            copies.run(list(zip(views, data, strict=True)), place)
            return
        for view, numbers in zip(views, data, strict=True):
            _write(view, numbers, rate)

    def _boxes(self, placement: Placement) -> dict[str, Box]:
        """This device's boxes of the parameters that move."""
        rank = placement.mesh.rank_of(self.site.device)
        if rank is None:
            return {}
        boxes = boxes_of(placement.layout, self._table, rank)
        return {name: boxes[name] for name in self._names if name in boxes}

    @cached_property
    def _cells(self) -> tuple[dict[str, list[list[int]]], dict[str, list[list[int]]]]:
        """For source and target, for each parameter, the ranks that hold each of its boxes."""
        source, target = (self._holders(placement) for placement in (self.plan.source, self.plan.target))
        return source, target

    def _holders(self, placement: Placement) -> dict[str, list[list[int]]]:
        holders: dict[str, dict[Box, list[int]]] = {name: {} for name in self._names}
        for rank in range(placement.layout.num_ranks):
            for name, box in boxes_of(placement.layout, self._table, rank).items():
                if name in holders:
                    holders[name].setdefault(box, []).append(rank)
        return {name: list(cells.values()) for name, cells in holders.items()}

    def _rank(self, placement: Placement, rank: int) -> int:
        """A placement's rank as one of the group."""
        world = self.site.ranks[placement.mesh.devices[rank]]
        return world if self.site.group is None else dist.get_group_rank(self.site.group, world)

    def _fingerprints(self, tensors: Shards, boxes: Mapping[str, Box]) -> Tensor:
        """int64 [parameters, 2]; zeros for what is not here."""
        none = torch.zeros(2, dtype=torch.int64)
        found = [
            fingerprint(tensors[name], boxes[name], self._table[name].shape) if name in boxes else none
            for name in self._names
        ]
        return torch.stack(found) if found else none[None]

    def _gathered(self, own: Tensor) -> list[Tensor]:
        """Everybody's tensor of this shape, by rank in the group."""
        own = own.contiguous().to(self.site.torch_device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(self.site.group))]
        dist.all_gather(everyone, own, group=self.site.group)
        return [one.cpu() for one in everyone]

    def _check(self, held: Shards, into: Shards | None, rate: float | None) -> None:
        if self.plan.mix != (rate is not None) or (self.plan.mix and into is None):
            raise ValueError("A plan that mixes needs a rate and memory to mix into; another takes no rate.")
        _check_tensors(held, self._shapes[0], self.plan.dtypes.source)
        if into is not None:
            _check_tensors(into, self._shapes[1], self.plan.dtypes.target)

    def _memory(self, held: Shards, into: Shards | None) -> dict[str, Tensor]:
        aliased = {alias.name for alias in self._share.aliases}
        if into is not None:
            return {name: held[name] if name in aliased else into[name] for name in self._wanted}
        dtype, device = getattr(torch, self.plan.dtypes.target), self.site.torch_device
        return {
            name: held[name] if name in aliased else torch.empty(shape_of(box), dtype=dtype, device=device)
            for name, box in self._wanted.items()
        }

    def _exchange(self, part: Round, held: Shards, new: Shards, rate: float | None) -> None:
        """Post a round's receives and sends as one batch, wait, and write what was staged."""
        staged: list[tuple[Tensor, Tensor]] = []
        operations = []
        for transfer in part.receives:
            view = new[transfer.name][transfer.target_slices]
            direct = rate is None and view.dtype == self._wire and view.is_contiguous()
            buffer = view if direct else torch.empty(transfer.shape, dtype=self._wire, device=view.device)
            if not direct:
                staged.append((view, buffer))
            peer = self.site.ranks[self.plan.source.mesh.devices[transfer.source]]
            operations.append(dist.P2POp(dist.irecv, _as_bytes(buffer), peer, self.site.group))
        for transfer, data in _outgoing(part.sends, held, self._wire):
            peer = self.site.ranks[self.plan.target.mesh.devices[transfer.target]]
            operations.append(dist.P2POp(dist.isend, _as_bytes(data), peer, self.site.group))
        if operations:
            for request in dist.batch_isend_irecv(operations):
                request.wait()
        for view, buffer in staged:
            _write(view, buffer, rate)

    def _path(self) -> str:
        return f"the reallocation {self.plan.source} -> {self.plan.target}"


def _outgoing(sends: Sequence[Transfer], held: Shards, wire: torch.dtype) -> Iterator[tuple[Transfer, Tensor]]:
    """Each transfer with its data, contiguous and in the type that is sent; made once for several targets."""
    last: tuple[object, Tensor] | None = None
    for transfer in sends:
        key = transfer.name, transfer.box
        if last is None or last[0] != key:
            last = key, held[transfer.name][transfer.source_slices].to(wire).contiguous()
        yield transfer, last[1]


def _write(view: Tensor, data: Tensor, rate: float | None) -> None:
    """Replace, or mix in fp32 as `view <- rate * data + (1 - rate) * view`."""
    if rate is None:
        view.copy_(data)
    else:
        view.copy_(view.float().lerp_(data.float(), rate))


def _as_bytes(data: Tensor) -> Tensor:
    """The same memory as bytes: not every backend knows every type of number."""
    return data.view(-1).view(torch.uint8)


def _check_tensors(tensors: Shards, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    expected: torch.dtype = getattr(torch, dtype)
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.dtype is not expected or tensor.shape != shape:
            found = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            raise ValueError(f"{name} is {found or 'missing'} here, and the plan has {(shape, dtype)}.")
