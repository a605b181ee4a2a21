"""Pipeline stages, applied from outside: a decoder keeps a stage's layers, and rows go from stage to stage.

Which parameters a stage has is the shard table's to say; a tied embedding is on the first stage and the last.
Sends never wait, receives name the neighbour, and both sides know the shapes, so that nothing but rows travels. It
knows nothing of micro-batches or of their schedule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from meshift.layout.boxes import count_layers, stages_of
from meshift.layout.layout import Layout
from meshift.models.decoder import Decoder
from meshift.models.shards import shard_table
from meshift.parallel.exchange import group_device
from meshift.parallel.groups import Peers, Place
from meshift.parallel.tensor import cut_model

FORWARD, BACKWARD, ASIDE = 1, 2, 3
"""Tags: rows of later stages, gradients of earlier ones, and what a stage tells all others."""
MAX_UNDER_WAY = 64
"""Messages whose memory is held, at most; by then the oldest has long arrived."""


def cut_for(model: Decoder, place: Place) -> Decoder:
    """A process's part of a whole decoder, in place: its tensor part of its stage's layers.

    Every process of the placement calls it. Raises `LayoutError` where the model cannot be cut so.
    """
    return keep_stage(cut_model(model, place.tensor), place.layout, place.pipeline.index)


def keep_stage(model: Decoder, layout: Layout, stage: int) -> Decoder:
    """Leave out, in place, what other pipeline stages have. Names of parameters stay."""
    if layout.pipeline == 1:
        return model
    table = shard_table(model.config, model.head_kind)
    num_layers = count_layers(table)
    model.layers.keep(layout.stage_layers(num_layers)[stage])
    for name, shard in table.items():
        if shard.layer is None and stage not in stages_of(shard, layout, num_layers):
            owner, _, own = name.rpartition(".")
            model.get_submodule(owner).register_parameter(own, None)
    model.embeds, model.ends = stage == 0, stage == layout.pipeline - 1
    return model


class Stages:
    """The pipeline that a process is in, and what it hands to the stages beside it."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._under_way: deque[tuple[dist.Work, Tensor]] = deque()

    @property
    def is_first(self) -> bool:
        """Whether tokens enter here."""
        return self.peers.index == 0

    @property
    def is_last(self) -> bool:
        """Whether the head is here."""
        return self.peers.index == len(self.peers) - 1

    def pass_on(self, rows: Tensor) -> None:
        """Begin to send rows to the next stage."""
        self._send(rows, self.peers.index + 1, FORWARD)

    def receive(self, into: Tensor) -> Tensor:
        """Rows from the stage before."""
        return self._receive(into, self.peers.index - 1, FORWARD)

    def enter(self, num_rows: int, model: Decoder) -> Tensor | None:
        """What enters this stage's part of a model; None where that is tokens."""
        if self.is_first:
            return None
        shape = num_rows, model.config.hidden_size
        return self.receive(torch.empty(shape, dtype=model.dtype, device=model.device))

    def pass_back(self, gradient: Tensor) -> None:
        """Begin to send the gradient of received rows to where they came from."""
        self._send(gradient, self.peers.index - 1, BACKWARD)

    def receive_back(self, like: Tensor) -> Tensor:
        """The gradient of rows that were passed on."""
        return self._receive(torch.empty_like(like), self.peers.index + 1, BACKWARD)

    def tell(self, numbers: Tensor) -> None:
        """Begin to send the other stages something; the last stage calls this, the others `hear`."""
        numbers = numbers.to(group_device(self.peers))
        for index in range(len(self.peers) - 1):
            self._send(numbers, index, ASIDE)

    def hear(self, into: Tensor) -> Tensor:
        """What the last stage tells, of the shape and type of `into`, and where that is."""
        found = self._receive(into.to(group_device(self.peers)), len(self.peers) - 1, ASIDE)
        return found.to(into.device)

    def exchange_ends(self, tensors: Sequence[Tensor]) -> None:
        """Add to the first stage's tensors the last stage's, and the other way round, in place.

        Both call it, with tensors of the same shapes.
        """
        other = 0 if self.is_last else len(self.peers) - 1
        for tensor in tensors:
            self._send(tensor.clone(), other, ASIDE)
        for tensor in tensors:
            tensor.add_(self._receive(torch.empty_like(tensor), other, ASIDE))

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        while self._under_way:
            self._under_way.popleft()[0].wait()

    def _send(self, tensor: Tensor, index: int, tag: int) -> None:
        tensor = tensor.detach().contiguous()
        group = self.peers.group if index > self.peers.index else self.peers.back
        work = dist.isend(tensor, self.peers.ranks[index], group=group, tag=tag)
        assert work is not None
        self._under_way.append((work, tensor))
        while len(self._under_way) > MAX_UNDER_WAY:
            self._under_way.popleft()[0].wait()

    def _receive(self, into: Tensor, index: int, tag: int) -> Tensor:
        group = self.peers.group if index < self.peers.index else self.peers.back
        dist.recv(into, self.peers.ranks[index], group=group, tag=tag)
        return into
