"""Parameters of which each data rank keeps some rows: brought together for a while, and their gradients added up.

A group is what is brought together at a time: a layer, say. Between times its modules have the rows that are kept
here, as parameters of their own. It knows nothing of layers or passes, or of when anything is brought together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshift.kernels.functions import sums_of
from meshift.parallel.groups import Peers

Rows = list[tuple[int, int]]
"""Rows [start, stop) of one parameter that each peer keeps."""


@dataclass(kw_only=True)
class Slot:
    """One parameter's place in a module: `kept` are this rank's rows of it, `whole` all of them, for a while.

    `whole` is the same tensor each time, so that what autograd saved of it is there again in the backward pass; in
    between its memory is freed. `gradient` adds up in fp32 where `whole` is of another type.
    """

    module: nn.Module
    name: str
    kept: nn.Parameter
    whole: nn.Parameter
    gradient: Tensor | None = None

    @classmethod
    def cut(cls, model: nn.Module, name: str, peers: Peers, device: torch.device | None = None) -> Slot:
        """Let a parameter of the model be this rank's rows of it: as `layout.boxes` cuts them.

        These rows are all that goes to the `device`.
        """
        parent, _, own = name.rpartition(".")
        module = model.get_submodule(parent)
        given: nn.Parameter = getattr(module, own)
        start, stop = rows_of(len(given), len(peers))[peers.index]
        rows = copied(given.detach()[start:stop], device)
        kept = nn.Parameter(rows, requires_grad=given.requires_grad)
        slot = cls(module=module, name=own, kept=kept, whole=nn.Parameter(rows.new_empty(given.shape)))
        if given.dtype != torch.float32:
            slot.whole.register_post_accumulate_grad_hook(slot.take)
            # Kernels that have a gradient in fp32 add it there themselves (`kernels.functions`).
            setattr(slot.whole, "gradient_sum", slot.sums)  # noqa: B010
        slot.free()
        return slot

    def fill(self) -> Tensor:
        """Let the module have the whole parameter, whose memory is given back to be written to."""
        self.whole.untyped_storage().resize_(self.whole.nbytes)
        self.whole.requires_grad_(self.kept.requires_grad)
        setattr(self.module, self.name, self.whole)
        return self.whole.data  # which does not count as a change to what autograd saved

    def free(self) -> None:
        """Let the module have the rows that are kept."""
        setattr(self.module, self.name, self.kept)
        self.whole.untyped_storage().resize_(0)

    def sums(self) -> Tensor:
        """The fp32 buffer of the whole parameter's gradient."""
        if self.gradient is None:
            self.gradient = torch.zeros(self.whole.shape, device=self.whole.device)
        return self.gradient

    def take(self, whole: Tensor) -> None:
        """Move the gradient that autograd left into the buffer."""
        if whole.grad is None:
            return
        if self.gradient is None:
            self.gradient = whole.grad.float()
        else:
            self.gradient.add_(whole.grad)
        whole.grad = None

    def pop_gradient(self) -> Tensor | None:
        """The whole parameter's gradient in fp32, forgotten here; None where there was none."""
        found = self.whole.grad if self.gradient is None else self.gradient
        self.whole.grad, self.gradient = None, None
        return found

    def add(self, gradient: Tensor) -> None:
        """Add to the gradient of the rows that are kept, where the optimizer looks for it."""
        sums = sums_of(self.kept)
        if sums is not None:
            sums().add_(gradient)
        elif self.kept.grad is None:
            self.kept.grad = gradient.clone()
        else:
            self.kept.grad.add_(gradient)


class Group:
    """Parameters that are brought together at one time, by all of `peers`. They are of one type."""

    def __init__(
        self, model: nn.Module, names: Sequence[str], peers: Peers, device: torch.device | None = None
    ) -> None:
        self.slots = [Slot.cut(model, name, peers, device) for name in names]
        self._peers = peers
        self._rows = [rows_of(len(slot.whole), len(peers)) for slot in self.slots]
        self._sizes = [
            [
                (rows[peer][1] - rows[peer][0]) * (slot.whole.numel() // len(slot.whole))
                for rows, slot in self._both()
            ]
            for peer in range(len(peers))
        ]
        self._order = sorted(range(len(peers)), key=peers.ranks.__getitem__)  # peers, as torch numbers them

    @property
    def trains(self) -> bool:
        """Whether any of its parameters is trained."""
        return any(slot.kept.requires_grad for slot in self.slots)

    @torch.no_grad()
    def gather(self, *, keep: bool) -> None:
        """Bring all rows together; without `keep` for the others only, since each sends its own."""
        if not self.slots:
            return
        own = self.slots[0].kept.new_empty(sum(self._sizes[0]))  # nobody keeps more than the first
        kept = [slot.kept.detach().view(-1) for slot in self.slots]
        torch._foreach_copy_(list(own[: sum(map(len, kept))].split([len(part) for part in kept])), kept)
        parts = [torch.empty_like(own) for _ in range(len(self._peers))]
        dist.all_gather(parts, own, group=self._peers.group)
        if not keep:
            return
        wholes = [slot.fill() for slot in self.slots]
        for peer, part in enumerate(self._peers.in_order(parts)):
            sizes = self._sizes[peer]
            torch._foreach_copy_(list(self._parts(wholes, peer)), list(part[: sum(sizes)].split(sizes)))

    @torch.no_grad()
    def reduce(self) -> None:
        """Add up everybody's gradients of the rows that each peer keeps, and forget those of the whole.

        Rows are exchanged and added here, in the same order everywhere and at any time. (On gloo this takes half
        the time of its reduce-scatter, which adds up all rows for all; it sends as many bytes as a true one.)
        """
        trained = [i for i, slot in enumerate(self.slots) if slot.kept.requires_grad]
        if not trained:
            return
        gradients = [self.slots[i].pop_gradient() for i in trained]
        sizes = [[self._sizes[peer][i] for i in trained] for peer in self._order]
        lengths = [sum(of_peer) for of_peer in sizes]
        outgoing = self.slots[0].kept.new_zeros(sum(lengths), dtype=torch.float32)
        for peer, of_peer, block in zip(self._order, sizes, outgoing.split(lengths), strict=True):
            for i, gradient, room in zip(trained, gradients, block.split(of_peer), strict=True):
                if gradient is not None:
                    start, stop = self._rows[i][peer]
                    room.copy_(gradient[start:stop].reshape(-1))
        place = self._order.index(self._peers.index)
        arrived = outgoing.new_empty(len(self._peers), lengths[place])
        dist.all_to_all_single(
            *(arrived.view(-1), outgoing),
            output_split_sizes=[lengths[place]] * len(self._peers),
            input_split_sizes=lengths,
            group=self._peers.group,
        )
        for i, total in zip(trained, arrived.sum(0).split(sizes[place]), strict=True):
            self.slots[i].add(total.view_as(self.slots[i].kept))

    def free(self) -> None:
        """Forget the rows of others."""
        for slot in self.slots:
            slot.free()

    def _both(self) -> Iterator[tuple[Rows, Slot]]:
        yield from zip(self._rows, self.slots, strict=True)

    def _parts(self, wholes: Sequence[Tensor], peer: int) -> Iterator[Tensor]:
        """Of every whole parameter, the rows that a peer keeps, flat."""
        for rows, whole in zip(self._rows, wholes, strict=True):
            yield whole[rows[peer][0] : rows[peer][1]].view(-1)


def copied(numbers: Tensor, device: torch.device | None = None) -> Tensor:
    """Contiguous memory of its own with these numbers, on a device, or where they are."""
    where = numbers.device if device is None else device
    return numbers.to(where, copy=True, memory_format=torch.contiguous_format)


def rows_of(num_rows: int, num_peers: int) -> Rows:
    """Rows [start, stop) of each peer, in chunks as `torch.chunk` makes them; the last may have none."""
    chunk = -(-num_rows // num_peers)
    starts = [min(num_rows, peer * chunk) for peer in range(num_peers + 1)]
    return list(pairwise(starts))
