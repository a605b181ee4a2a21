"""Fingerprints of parameters: two sums over their bits, which do not depend on how the parameter is cut.

Those of disjoint boxes add up to the whole's. It knows nothing of layouts, plans or processes.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from meshift.kernels.cpu import kernels
from meshift.layout.boxes import Box, shape_of

BLOCK = 1 << 18
"""Numbers that are summed at a time, so that their copies in fp64 stay in the cache."""
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fingerprint(shard: Tensor, box: Box, whole: tuple[int, ...]) -> Tensor:
    """int64 [2] of the numbers that fill `box` of a parameter of shape `whole`; arithmetic is modulo 2^64.

    Bits are summed along each row, and rows weighted by a hash of their place in the whole; the same along each
    column. So a number that changed shows, and so do boxes that were exchanged or put in a wrong place.
    """
    if shard.shape != shape_of(box):
        raise ValueError(f"A shard of {tuple(shard.shape)} does not fill the box {box}.")
    if not shard.numel():
        return torch.zeros(2, dtype=torch.int64)
    rows = box[0] if box else (0, 1)
    bits = shard.contiguous().view(_INTEGERS[shard.element_size()]) if box else shard.reshape(1).view(torch.uint8)
    bits = bits.reshape(rows[1] - rows[0], -1)
    of_rows, of_columns = _sums(bits)
    of_rows *= _weights((rows,), (rows[1],), shard.device)
    of_columns *= _weights(box[1:], whole[1:], shard.device)
    return torch.stack([of_rows.sum(), of_columns.sum()]).cpu()


def _sums(bits: Tensor) -> tuple[Tensor, Tensor]:
    """int64 sums of each row and of each column of [rows, columns].

    By the CPU kernels, where there are any. Else in fp64 products with ones, block by block: exact, since all sums
    are below 2^53, and twelve times as fast on a CPU as a sum of int16 that counts in int64 (measured).
    """
    found = kernels() if bits.device.type == "cpu" and bits.element_size() in (2, 4) else None
    if found is not None:
        return found.bit_sums(bits)
    if bits.dtype == torch.int64:
        return bits.sum(1), bits.sum(0)
    num_rows, num_columns = bits.shape
    size = max(1, BLOCK // num_columns)
    of_rows, of_columns = (
        bits.new_empty(num_rows, dtype=torch.int64),
        bits.new_zeros(num_columns, dtype=torch.int64),
    )
    ones = torch.ones(max(size, num_columns), dtype=torch.float64, device=bits.device)
    for start in range(0, num_rows, size):
        block = bits[start : start + size].double()
        of_rows[start : start + size] = (block @ ones[:num_columns]).long()
        of_columns += (ones[: len(block)] @ block).long()
    return of_rows, of_columns


@lru_cache(maxsize=64)
def _weights(box: Box, whole: tuple[int, ...], device: torch.device) -> Tensor:
    """A number for each cell of a box, by its place in the whole. Most parameters have the box of another one."""
    return _hashed(_places(box, whole, device))


def _places(box: Box, whole: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of each cell of a box in its whole, counted in C order; one cell where there are no dims."""
    places = torch.zeros(1, dtype=torch.int64, device=device)
    for dim, (start, stop) in enumerate(box):
        steps = torch.arange(start, stop, device=device) * prod(whole[dim + 1 :])
        places = (places[:, None] + steps).flatten()
    return places


def _hashed(places: Tensor) -> Tensor:
    """An odd number per place, spread over 64 bits (the mixing steps of splitmix64)."""
    mixed = (places + 1) * -7046029254386353131
    mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
    return (mixed ^ (mixed >> 31)) | 1
