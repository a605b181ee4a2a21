"""Sums, largest values and gathers over peers, some of them steps of a forward pass with a backward pass.

Knows nothing of models. Where a process is alone nothing is sent and nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from meshift.parallel.groups import Peers


def sum_of(parts: Tensor, peers: Peers) -> Tensor:
    """The sum of everybody's tensor. Not differentiable."""
    return _reduced(parts, peers, dist.ReduceOp.SUM)


def max_of(parts: Tensor, peers: Peers) -> Tensor:
    """The largest of everybody's, number by number. Not differentiable."""
    return _reduced(parts, peers, dist.ReduceOp.MAX)


def enter(x: Tensor, peers: Peers) -> Tensor:
    """`x`, which all have alike and each multiplies by its part: its gradient is the sum of theirs."""
    return x if peers.group is None else _Enter.apply(x, peers)


def leave(x: Tensor, peers: Peers) -> Tensor:
    """The sum of what everybody's part gives, which all then have alike, as they have its gradient."""
    return x if peers.group is None else _Leave.apply(x, peers)


def sum_both_ways(x: Tensor, peers: Peers) -> Tensor:
    """The sum of everybody's `x`, of which each makes another use: its gradient is the sum of theirs."""
    return enter(leave(x, peers), peers)


def beside(x: Tensor, widths: list[int], peers: Peers) -> Tensor:
    """[n, widths[i]] of each peer i beside each other, which all then have alike, as they have its gradient."""
    return x if peers.group is None else _Beside.apply(x, widths, peers)


def _reduced(parts: Tensor, peers: Peers, operation: Any) -> Tensor:
    if peers.group is None:
        return parts
    whole = parts.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(whole, op=operation, group=peers.group)
    return whole


class _Enter(torch.autograd.Function):
    """See `enter`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_of(grad, ctx.peers), None


class _Leave(torch.autograd.Function):
    """See `leave`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return sum_of(x, peers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Beside(torch.autograd.Function):
    """See `beside`. Parts are padded to the widest, since gloo gathers equal shapes only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: list[int], peers: Peers) -> Tensor:
        ctx.start, ctx.width = sum(widths[: peers.index]), widths[peers.index]
        padded = torch.nn.functional.pad(x, (0, max(widths) - x.shape[-1])).contiguous()
        everyone = [torch.empty_like(padded) for _ in widths]
        dist.all_gather(everyone, padded, group=peers.group)
        parts = zip(peers.in_order(everyone), widths, strict=True)
        return torch.cat([part[:, :width] for part, width in parts], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(-1, ctx.start, ctx.width), None, None
