"""Causal attention over packed rows: the protocol the decoder calls, a fast way and its plain twin.

The decoder hands over flat rows after rotary and does not know which rows belong together; these objects do.
Knows nothing of weights or of a cache (generation has an attention of its own that reads one).
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from meshift.kernels import functions
from meshift.kernels.cpu import Sequences, kernels_for, packed_attention_serves
from meshift.models.continued import Continued
from meshift.models.masked_attention import AttentionLayer, masked_attention
from meshift.models.rows import pick

# A bucket of sequences is padded to its longest; it is closed before padding exceeds this part of its rows.
MAX_PADDING = 0.25
# On a CPU the backward pass of half-precision attention costs 2.7 times (32 rows) to 2 times (128 rows) what
# casting to fp32 and back does; from about 512 rows on it is the other way round.
MAX_UPCAST_LENGTH = 512
# Rows of a sequence whose scores are made at once where a window or a softcap rules out the plain causal kernel.
BLOCK = 512


class Attention(Protocol):
    """Decides which rows attend to which."""

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend.

        `query` is [T, num_heads, head_dim]; `key` and `value` are [T, num_kv_heads, head_dim], query and key
        after rotary. Returns [T, num_heads, head_dim].
        """
        ...


def packed_positions(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The positions of packed sequences, int64 [sum(lengths)], each from 0: [2, 3] -> 0 1 0 1 2."""
    counts = torch.tensor(lengths, dtype=torch.int64)
    starts = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    positions = torch.arange(starts.numel(), dtype=torch.int64) - starts
    return positions.to(device) if device is not None else positions


class PackedAttention:
    """Block-diagonal causal attention over sequences that lie one after another. Differentiable.

    Sequences of similar length are brought together in right-padded buckets, for the attention alone. Right
    padding with a causal mask needs no other mask: a real query never sees the padding behind it, and the
    padding's own results are dropped. No matrix over all rows by all rows is ever made. Where a window is
    shorter than the bucket, or scores are capped, the bucket is taken in blocks of rows. Pieces that continue
    another are for `Continued`, where no kernel does all of it.
    """

    def __init__(self, lengths: Sequence[int], before: Sequence[int] | None = None) -> None:
        """`lengths`: rows of each piece, in the order they are packed. A length of zero is allowed.

        A piece is a sequence, unless `before` says otherwise: then piece i continues piece `before[i]`, whose rows
        several may have in common (itself: it continues none). Such pieces stand right behind the one before.
        """
        if any(length < 0 for length in lengths):
            raise ValueError(f"A sequence cannot have a negative length; got {min(lengths)}.")
        self.num_rows = sum(lengths)
        self._starts = torch.tensor([0, *accumulate(lengths)])
        self._before = torch.arange(len(lengths)) if before is None else torch.tensor(before, dtype=torch.int64)
        whole = self._before == torch.arange(len(lengths))
        self._whole_rows = None if whole.all() else whole.repeat_interleave(self._starts.diff()).nonzero()[:, 0]
        lengths = self._starts.diff()[whole].tolist()
        self.buckets = _buckets(lengths)
        padded, packed = _row_indices(lengths, self.buckets)
        in_order = torch.equal(padded, torch.arange(sum(lengths)))
        self._rows = None if in_order else {padded.device: (padded, packed)}

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attention`."""
        _check_rows(query, self.num_rows)
        if self.num_rows == 0:
            return query
        kernels = kernels_for(query)
        if kernels is not None and layer.softcap is None and packed_attention_serves(query.shape[2]):
            sequences = Sequences(
                starts=self._starts, before=self._before, scale=layer.scale, window=layer.window or 0
            )
            return functions.packed_attention(kernels, query, key, value, sequences)
        if self._whole_rows is None:
            return self._attend(layer, query, key, value)
        rows = self._whole_rows.to(query.device)
        others = self._attend(layer, *(pick(x, rows) for x in (query, key, value)))
        return self._continued(layer, query, key, value, (rows, others))

    @cached_property
    def _continued(self) -> Continued:
        return Continued(self._starts, self._before)

    def _attend(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The rows of whole sequences alone, which continue nothing."""
        if not self.buckets:
            return query
        parts = [self._pad(x) for x in (query, key, value)]
        attended = [_attend_bucket(q, k, v, layer) for q, k, v in zip(*parts, strict=True)]
        return self._unpad(torch.cat(attended) if len(attended) > 1 else attended[0])

    def _pad(self, rows: Tensor) -> list[Tensor]:
        """[T, heads, dim] -> per bucket [sequences, heads, longest, dim]."""
        if self._rows is not None:
            padded, packed = self._on(rows.device)
            rows = _Rearrange.apply(rows, padded, packed)
        sizes = [len(bucket) * longest for bucket, longest in self.buckets]
        return [
            part.unflatten(0, (-1, longest)).transpose(1, 2)
            for part, (_, longest) in zip(rows.split(sizes), self.buckets, strict=True)
        ]

    def _unpad(self, rows: Tensor) -> Tensor:
        """Padded rows of all buckets [P, heads, dim] -> [T, heads, dim]."""
        if self._rows is None:
            return rows
        padded, packed = self._on(rows.device)
        return _Rearrange.apply(rows, packed, padded)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self._rows is not None
        if device not in self._rows:
            padded, packed = next(iter(self._rows.values()))
            self._rows[device] = (padded.to(device), packed.to(device))
        return self._rows[device]


def _attend_bucket(query: Tensor, key: Tensor, value: Tensor, layer: AttentionLayer) -> Tensor:
    """Causal attention of [sequences, heads, longest, dim] -> rows [sequences * longest, heads, dim]."""
    dtype = query.dtype
    # Chosen by shape alone, never by whether gradients are on: inference and training must agree bit for bit.
    if query.device.type == "cpu" and query.shape[2] <= MAX_UPCAST_LENGTH:
        query, key, value = query.float(), key.float(), value.float()
    if layer.softcap is not None or (layer.window is not None and layer.window < query.shape[2]):
        attended = _attend_blocks(query, key, value, layer)
    else:
        grouped = query.shape[1] != key.shape[1]
        attended = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=layer.scale, enable_gqa=grouped
        )
    return attended.transpose(1, 2).flatten(0, 1).to(dtype)


def _attend_blocks(query: Tensor, key: Tensor, value: Tensor, layer: AttentionLayer) -> Tensor:
    """Causal attention within a window or with capped scores, [sequences, heads, longest, dim] all.

    Each block of rows meets only the keys that some row of it sees.
    """
    if layer.softcap is None:  # `masked_attention` would repeat the mask instead, and masks are kept
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    parts = []
    for start in range(0, query.shape[2], BLOCK):
        stop = min(start + BLOCK, query.shape[2])
        first = 0 if layer.window is None else max(0, start - layer.window + 1)
        rows = (query[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop], layer, start - first)
        if layer.softcap is not None and torch.is_grad_enabled():  # scores are made again instead of being kept
            parts.append(recompute(_attend_block, *rows, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_attend_block(*rows))
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _attend_block(query: Tensor, key: Tensor, value: Tensor, layer: AttentionLayer, offset: int) -> Tensor:
    """Rows [sequences, heads, Q, dim] against keys [.., K, dim]; row i stands at the place of key i + offset."""
    rows = torch.arange(query.shape[2], device=query.device).unsqueeze(1) + offset
    columns = torch.arange(key.shape[2], device=query.device)
    visible = columns <= rows
    if layer.window is not None:
        visible &= columns > rows - layer.window
    return masked_attention(query, key, value, visible.unsqueeze(0), layer)


class _Rearrange(torch.autograd.Function):
    """`rows[index]`, where index and `inverse` undo each other on real rows and -1 stands for padding.

    The gradient is then a gather as well. Autograd's own would be an `index_add_`, which walks the rows one
    by one on a CPU.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index, inverse)
        return _take(rows, index, inverse)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        index, inverse = ctx.saved_tensors
        return _take(grad, inverse, index), None, None


def _take(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`rows[index]` with zeros where the index is -1; `inverse` tells where each row goes."""
    if len(index) <= len(inverse):  # no padding on this side, hence no -1
        return rows.index_select(0, index)
    return rows.new_zeros(len(index), *rows.shape[1:]).index_copy_(0, inverse, rows)


def _buckets(lengths: Sequence[int]) -> list[tuple[list[int], int]]:
    """Sequences of similar length together: a list of (sequence indices, longest length)."""
    by_length = sorted((i for i, n in enumerate(lengths) if n > 0), key=lambda i: -lengths[i])
    buckets: list[tuple[list[int], int]] = []
    num_real = 0
    for i in by_length:
        if buckets:
            members, longest = buckets[-1]
            if num_real + lengths[i] >= (1 - MAX_PADDING) * longest * (len(members) + 1):
                members.append(i)
                num_real += lengths[i]
                continue
        buckets.append(([i], lengths[i]))
        num_real = lengths[i]
    return buckets


def _row_indices(lengths: Sequence[int], buckets: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """For each padded row its packed row (-1: padding), and for each packed row its padded row."""
    starts = torch.tensor([0, *accumulate(lengths)])
    counts = torch.tensor([*lengths, 0])
    blocks = [torch.empty(0, dtype=torch.int64)]
    for members, longest in buckets:
        column = torch.arange(longest)
        rows = starts[members].unsqueeze(1) + column
        blocks.append(rows.masked_fill(column >= counts[members].unsqueeze(1), -1).flatten())
    padded = torch.cat(blocks)
    real = (padded >= 0).nonzero().squeeze(1)
    packed = torch.empty(len(real), dtype=torch.int64)
    packed[padded[real]] = real
    return padded, packed


class PlainAttention:
    """The plain twin of `PackedAttention`: one sequence after another, an explicit mask, softmax in fp32."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Attention`."""
        _check_rows(query, sum(self.lengths))
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        blocks = zip(*(x.split(self.lengths) for x in (query, key, value)), strict=True)
        return torch.cat([_attend(q, k, v, layer) for q, k, v in blocks])


def _attend(query: Tensor, key: Tensor, value: Tensor, layer: AttentionLayer) -> Tensor:
    """softmax(cap(scale q k') + causal mask) v for one sequence, [length, heads, dim] each."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), key.float()) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * (scores / layer.softcap).tanh()
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    if layer.window is not None:
        unseen |= torch.ones_like(unseen).tril(-layer.window)
    weights = scores.masked_fill(unseen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value.float()).to(query.dtype)


def _check_rows(query: Tensor, num_rows: int) -> None:
    if query.shape[0] != num_rows:
        raise ValueError(f"The lengths add up to {num_rows} rows, but {query.shape[0]} rows were given.")
