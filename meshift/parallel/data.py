"""Data parallelism over a (tensor-cut) model: who takes which rows, and what is added up after.

Every process of a mesh is given the same whole batch and ends with the same whole result, so that the code around
it is that of one device. It knows nothing of readings, losses or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from meshift.batch import Batch, balanced_partition
from meshift.layout.boxes import held_box
from meshift.layout.shard import share_out
from meshift.models.decoder import Decoder
from meshift.models.shards import shard_table
from meshift.parallel.collectives import sum_of
from meshift.parallel.exchange import gather_batches, gather_facts
from meshift.parallel.groups import Place
from meshift.parallel.pipeline import Stages
from meshift.parallel.tensor import add_shared, shared_parameters

BUCKET = 1 << 24
"""Numbers that are added up in one message."""


@dataclass(kw_only=True)
class Statistics:
    """Numbers of an update that add up over its parts, those of which the largest counts, and what went wrong.

    `flops` are the operations of the parts, which add up too and are no statistic.
    """

    sums: dict[str, float] = field(default_factory=dict)
    maxima: dict[str, float] = field(default_factory=dict)
    trouble: str | None = None
    flops: float = 0.0

    def add(self, sums: Mapping[str, float], maxima: Mapping[str, float]) -> None:
        """Take in those of another part."""
        for key, value in sums.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        for key, value in maxima.items():
            self.maxima[key] = max(self.maxima.get(key, -math.inf), value)

    def by_name(self) -> dict[str, float]:
        """All of them."""
        return {**self.sums, **self.maxima}


class Ranks:
    """What one process of a placement has to settle with the others around a forward or a backward pass."""

    def __init__(self, model: Decoder, place: Place) -> None:
        """`model` is this rank's part."""
        self.place, self._device = place, model.device
        self.stages = Stages(place.pipeline) if place.pipeline.group is not None else None
        self._shared = shared_parameters(model, place.tensor)
        table = shard_table(model.config, model.head_kind)
        self._is_sharded = place.layout.sharded
        if self._is_sharded:  # of each this rank has some rows, and so have those that share it with their part
            bounds = {name: held_box(table[name], place.layout, place.coordinates)[0] for name in self._shared}
            self._shared = {name: replace(one, bounds=bounds[name]) for name, one in self._shared.items()}
        self._num_holders = {
            name: len(place.tensor) if shard.split is None else 1 for name, shard in table.items()
        } | {name: shared.num_holders for name, shared in self._shared.items()}
        self._at_both_ends = [name for name, shard in table.items() if shard.tied and self.stages is not None]
        self._num_holders.update((name, 2 * self._num_holders[name]) for name in self._at_both_ends)

    def own_rows(self, sizes: Sequence[int]) -> list[int]:
        """The rows of a batch that are this data rank's: shares of nearly equal size, settled without a word."""
        return balanced_partition(sizes, len(self.place.data))[self.place.data.index]

    def whole(self, own: Batch, sizes: Sequence[int]) -> Batch:
        """The rows of everybody's `own_rows(sizes)`, in the batch's order."""
        if self.place.data.group is None:
            return own
        parts = balanced_partition(sizes, len(self.place.data))
        pieces = [p for p, rows in zip(gather_batches(own, self.place.data), parts, strict=True) if rows]
        order = torch.tensor([row for part in parts for row in part])
        return Batch.concat(pieces).index(torch.argsort(order))

    def neighbours(self, num_rows: int) -> range:
        """This data rank's share of so many rows, in one piece: neighbours may have a prompt in common."""
        return range(*share_out(num_rows, self.place.data.index, len(self.place.data)))

    def joined(self, own: Batch) -> Batch:
        """The rows of everybody's `neighbours`, in order."""
        return Batch.concat([piece for piece in gather_batches(own, self.place.data) if len(piece)])

    def settle(self, own: Statistics) -> Statistics:
        """Everybody's statistics together, and the first trouble that any of them has."""
        for peers in (self.place.pipeline, self.place.data):
            together = Statistics()
            for sums, maxima, trouble, flops in gather_facts(
                [own.sums, own.maxima, own.trouble, own.flops], peers
            ):
                together.add(sums, maxima)
                together.flops += flops
                together.trouble = together.trouble or trouble
            own = together
        return own

    def add_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Make every gradient that of the whole batch and of the whole model, in place.

        In a sharded layout they are that of the whole batch already (`sharded.py`).
        """
        for name, shared in self._shared.items():
            if name in gradients:
                add_shared(gradients[name], shared, self.place.tensor)
        at_ends = [gradients[name] for name in self._at_both_ends if name in gradients]
        if self.stages is not None and at_ends:
            self.stages.exchange_ends(at_ends)
            self.stages.finish()
        if self.place.data.group is not None and not self._is_sharded:
            for bucket in _buckets(list(gradients.values())):
                flat = torch.cat([gradient.flatten() for gradient in bucket])
                dist.all_reduce(flat, group=self.place.data.group)
                for gradient, part in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                    gradient.copy_(part.view_as(gradient))

    def norm(self, gradients: Mapping[str, Tensor]) -> float:
        """The norm of the whole model's gradient; what several ranks hold counts once."""
        squares = [_squared(g) / self._num_holders[name] for name, g in gradients.items()]
        none = torch.zeros((), dtype=torch.float64, device=self._device)
        own = torch.stack(squares).sum() if squares else none
        total = sum_of(sum_of(own, self.place.tensor), self.place.pipeline)
        return math.sqrt(float(sum_of(total, self.place.data) if self._is_sharded else total))


def _squared(gradient: Tensor) -> Tensor:
    """The sum of its squares in fp64, with no more than `BUCKET` of them in memory."""
    return torch.stack([part.double().square().sum() for part in gradient.flatten().split(BUCKET)]).sum()


def _buckets(gradients: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours together, up to `BUCKET` numbers, or one that has more."""
    buckets: list[list[Tensor]] = []
    room = 0
    for gradient in gradients:
        if gradient.numel() > room:
            buckets.append([])
            room = max(BUCKET, gradient.numel())
        buckets[-1].append(gradient)
        room -= gradient.numel()
    return buckets
