"""Rows of a tensor by their numbers, with gradients that are copies, or sums in an order that does not change.

Autograd's own gradient of `x[rows]` adds up rows that are named twice in whatever order threads come to them: in
fp32 no two runs need have the same bits. It knows nothing of what the rows are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable


def pick(x: Tensor, rows: Tensor | None) -> Tensor:
    """Those rows of `x`, of which none is named twice (None: all, in order)."""
    if rows is None:
        return x
    picked: Tensor = _Pick.apply(x, rows)
    return picked


class _Pick(Function):
    """`x[rows]`. No row is named twice, so that the gradient is a copy, where autograd's own adds row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.num_rows = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return grad.new_zeros(ctx.num_rows, *grad.shape[1:]).index_copy_(0, rows, grad), None


def repeat(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, where each row of `x` is named once or more often; `rows` is int64 [N], on any device.

    The gradient of a row is the sum of its copies' in the order in which they are named, in fp32 at least.
    """
    repeated: Tensor = _Repeat.apply(x, rows, _Copies.of(rows, len(x)))
    return repeated


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """Where the copies of each row are: its first one, and the later ones of `rows`, those with most copies first.

    `later[i]` holds the (i + 2)-th copies of `rows[: len(later[i])]`.
    """

    first: Tensor
    rows: Tensor
    later: list[Tensor]

    @classmethod
    def of(cls, rows: Tensor, num_rows: int) -> _Copies:
        rows = rows.cpu()
        counts = rows.bincount(minlength=num_rows)
        if len(counts) > num_rows or not bool((counts > 0).all()):
            raise ValueError(f"each of {num_rows} rows must be named, and no other")
        places = rows.argsort(stable=True)
        starts = counts.cumsum(0) - counts
        many = counts.argsort(descending=True, stable=True)
        at, left = starts[many], counts[many]
        later = [places[at[left > number] + number] for number in range(1, int(counts.max()) if num_rows else 1)]
        return cls(first=places[starts], rows=many[left > 1], later=later)


class _Repeat(Function):
    """See `repeat`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, copies: _Copies) -> Tensor:
        ctx.copies = copies
        return x.index_select(0, rows.to(x.device))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        copies, device = ctx.copies, grad.device
        found = grad.index_select(0, copies.first.to(device))
        rows = copies.rows.to(device)
        sums = found.index_select(0, rows).to(torch.promote_types(grad.dtype, torch.float32))
        for places in copies.later:
            sums[: len(places)] += grad.index_select(0, places.to(device))
        return found.index_copy_(0, rows, sums.to(grad.dtype)), None, None
