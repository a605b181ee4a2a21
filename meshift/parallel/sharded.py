"""Sharded data parallelism: forward and backward passes over a decoder whose data ranks each keep some rows.

Applied from outside: a layer's rows are brought together before it runs, forward or backward, and freed after; its
gradients are added up where its rows are kept. What is not of a layer (embedding, final norm, head) stays together
from the first pass to `end`. (Rajbhandari et al. 2020, arXiv:1910.02054, stage 3; rows as FSDP2 cuts them.)

Ranks have different numbers of rows, hence of passes, yet all have to bring together the same layers in the same
order. So each says what it is about to do, and all do what is the most urgent: whoever has no such pass to make
only takes part in bringing together and adding up. It knows nothing of readings, losses or optimizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from meshift.models.decoder import Decoder, Layer
from meshift.parallel.collectives import max_of
from meshift.parallel.gathered import Group, copied
from meshift.parallel.groups import Peers, Place


class Next(IntEnum):
    """What a rank is about to do; of what several want, the largest is done first."""

    END = 0
    FORWARD = 1
    BACKWARD = 2


class Passes:
    """Passes over a model whose weights are all here: each is made as its caller likes."""

    is_sharded = False
    """Whether only some rows are here between calls."""

    def forward(self) -> None:
        """To be called before each forward pass."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        loss.backward()

    def end(self) -> None:
        """To be called when the passes of a call are over, whatever became of them, also where there were none."""

    @contextmanager
    def gathered(self, *, learning: bool = False) -> Iterator[None]:
        """All weights are here, for passes without further word to the others.

        Gradients that are left are added up where their rows are kept in the end, if there is `learning`.
        """
        yield


class ShardedPasses(Passes):
    """See the module. Passes are those of the model's data ranks, each of which has one of these."""

    is_sharded = True

    def __init__(self, model: Decoder, peers: Peers, device: torch.device | None = None) -> None:
        """Let the model keep its own rows only, on the `device`."""
        names = [name for name, _ in model.named_parameters()]
        indices = [layer.attention.layer.index for layer in model.layers if isinstance(layer, Layer)]
        within = [[n for n in names if n.startswith(f"layers.{i}.")] for i in indices]
        rest = [name for name in names if not name.startswith("layers.")]
        self._layers = [Group(model, own, peers, device) for own in within]
        self._rest = Group(model, rest, peers, device)
        self._embedding, self._peers, self._device = model.embedding, peers, model.device
        self._has_rest = self._has_gradients = False
        self._in_backward = self._is_gathered = False
        self._reached = 0
        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(partial(self._before, index))
            layer.register_forward_hook(partial(self._after, index))

    def forward(self) -> None:
        """See `Passes`. Others may have backward passes to make first."""
        self._agree(Next.FORWARD)
        self._bring_rest(keep=True)

    def backward(self, loss: Tensor) -> None:
        """See `Passes`."""
        self._agree(Next.BACKWARD)
        self._go_back(loss)

    def end(self) -> None:
        """See `Passes`. Returns when all ranks have come to it, with all gradients where their rows are kept."""
        self._agree(Next.END)
        if self._has_gradients:
            self._rest.reduce()
        self._rest.free()
        self._has_rest = self._has_gradients = False

    @contextmanager
    def gathered(self, *, learning: bool = False) -> Iterator[None]:
        """See `Passes`. All ranks begin and end it together."""
        groups = [self._rest, *self._layers]
        for group in groups:
            group.gather(keep=True)
        self._is_gathered = True
        try:
            yield
        finally:
            self._is_gathered = False
            for group in groups:
                if learning:
                    group.reduce()
                group.free()

    def _agree(self, own: Next) -> None:
        """Take part in what others do, until this is what all do next, or take part in."""
        while (urgent := Next(int(max_of(self._vote(own), self._peers)))) != own:
            if urgent == Next.BACKWARD:
                self._go_back(None)
            else:
                self._bring_rest(keep=False)
                for group in self._layers:
                    group.gather(keep=False)

    def _vote(self, own: Next) -> Tensor:
        return torch.tensor([int(own)], device=self._device)

    def _bring_rest(self, *, keep: bool) -> None:
        if not self._has_rest:
            self._rest.gather(keep=keep)
        self._has_rest = True

    def _before(self, index: int, layer: nn.Module, given: Any) -> None:
        """Of a layer's forward pass; one that is run again in the backward pass was brought together for that."""
        if not (self._in_backward or self._is_gathered):
            self._layers[index].gather(keep=True)

    def _after(self, index: int, layer: nn.Module, given: Any, rows: Tensor) -> None:
        if self._in_backward or self._is_gathered:
            return
        self._layers[index].free()
        if rows.requires_grad:
            rows.register_hook(partial(self._back_to, index, True))

    def _go_back(self, loss: Tensor | None) -> None:
        """Run a backward pass, or only take part in one."""
        self._has_gradients = self._in_backward = True
        self._reached = len(self._layers)
        if loss is not None:
            loss.backward()
        lowest = self._lowest()
        if lowest < len(self._layers):
            self._back_to(lowest, False)  # nothing, where `loss` went all the way
            self._leave(lowest)
        self._in_backward = False

    def _back_to(self, index: int, keep: bool, grad: Tensor | None = None) -> None:
        """The backward pass comes to a layer: autograd has added all gradients of those above."""
        while self._reached > index:
            if self._reached < len(self._layers):
                self._leave(self._reached)
            self._reached -= 1
            self._layers[self._reached].gather(keep=keep)

    def _leave(self, index: int) -> None:
        self._layers[index].reduce()
        self._layers[index].free()

    def _lowest(self) -> int:
        """The lowest layer that a backward pass goes to: nothing is trained below it."""
        if any(parameter.requires_grad for parameter in self._embedding.parameters()):
            return 0
        return next((i for i, group in enumerate(self._layers) if group.trains), len(self._layers))


def passes_of(model: Decoder, place: Place | None) -> Passes:
    """How passes over a (tensor-cut) model are made; in a sharded layout the model keeps its own rows only.

    With a `place.device`, what the process keeps goes there, in memory of its own, a parameter at a time.
    """
    if place is not None and place.layout.sharded and place.data.group is not None:
        return ShardedPasses(model, place.data, place.device)
    if place is not None and place.device is not None:
        for parameter in model.parameters():
            parameter.data = copied(parameter.detach(), place.device)
    return Passes()
