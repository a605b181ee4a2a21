"""Many boxes copied at once: by a kernel that is told all of them in one table, or by torch.

The table is kept as long as the tensors lie where they lay, as parameters do: then a copy is one call, and no
tensor is cut up for it. It knows nothing of plans.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from meshift.kernels.cpu import kernels

CHUNK = 1 << 20
"""Bytes of one entry of the table: threads share out entries."""
Pairs = Sequence[tuple[Tensor, Tensor]]
"""Targets and sources, of the same shapes."""
Place = tuple[tuple[int, tuple[int, ...]], ...]
"""Of tensors whose shapes and types do not change: where they begin, and their strides."""


class Copies:
    """`run` copies pairs of tensors, which may be parts of larger ones; `again` repeats that."""

    def __init__(self) -> None:
        self._made_for: object = None
        self._table = torch.empty(0, 6, dtype=torch.int64)

    def again(self, place: Place, targets: Sequence[Tensor]) -> bool:
        """Copy what was copied from and to this place before. False, with nothing done, where nothing was.

        `targets` are the tensors that are written, or those that they are parts of.
        """
        found = kernels()
        if found is None or place != self._made_for:
            return False
        found.copy_rows(self._table)
        torch.autograd.graph.increment_version(targets)
        return True

    def run(self, pairs: Pairs, place: Place | None = None) -> None:
        """Write every source into its target, and remember how for this place."""
        self._made_for = None
        found = kernels()
        if not pairs:
            return
        if found is None or not all(_serves(target, source) for target, source in pairs):
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])
            return
        rows = [entry for target, source in pairs for entry in _entries(target, source)]
        self._table, self._made_for = torch.tensor(rows, dtype=torch.int64).view(-1, 6), place
        found.copy_rows(self._table)
        torch.autograd.graph.increment_version([target for target, _ in pairs])


def place_of(tensors: Iterable[Tensor]) -> Place:
    """Where these lie; the same only if every one of their numbers is where it was."""
    return tuple((tensor.data_ptr(), tensor.stride()) for tensor in tensors)


def _serves(target: Tensor, source: Tensor) -> bool:
    """Whether both are in this machine's memory, of one type, and rows of numbers without gaps."""
    alike = target.dtype == source.dtype and target.device.type == source.device.type == "cpu"
    return alike and target.dim() <= 2 and (target.dim() == 0 or target.stride(-1) == source.stride(-1) == 1)


def _entries(target: Tensor, source: Tensor) -> list[list[int]]:
    """The lines of the table: all rows, or some at a time. A vector is one row."""
    size = target.element_size()
    if not target.numel():
        return []
    if target.dim() < 2:
        rows, columns, here, there = 1, target.numel(), target.numel(), target.numel()
    else:
        (rows, columns), here, there = target.shape, target.stride(0), source.stride(0)
    if here == there == columns:  # one piece, however many rows
        total, first = rows * columns * size, (source.data_ptr(), target.data_ptr())
        return [
            [first[0] + at, first[1] + at, 1, (n := min(CHUNK, total - at)), n, n] for at in range(0, total, CHUNK)
        ]
    step = max(1, CHUNK // (columns * size))
    return [
        [
            source.data_ptr() + start * there * size,
            target.data_ptr() + start * here * size,
            min(step, rows - start),
            columns * size,
            there * size,
            here * size,
        ]
        for start in range(0, rows, step)
    ]
