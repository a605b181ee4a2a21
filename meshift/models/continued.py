"""Attention of pieces that continue another: only their own rows ask, and keys and values stay where they are.

The rows of a family (pieces that continue the same one) are cut into blocks. A round takes one block of each
family, lays out its keys for as long as it lasts, and forgets them: the backward pass makes them again. So nothing
of the length of whole sequences is kept. In a round no row is named twice, hence gradients are added up round by
round, in the same order whatever threads run. Knows nothing of weights, or of who shares what and why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from meshift.models.masked_attention import AttentionLayer, masked_attention

BLOCK_ROWS = 256
"""Rows of a block, at most."""
LEAST_ROWS = 64
"""Pieces that make no more rows than this together, or than a quarter of what they continue, are one block."""
MAX_PADDING = 0.25
"""A round's blocks are padded to the largest together until padding exceeds this part of their scores."""
_NEVER = 2**31 - 1


class _Block(NamedTuple):
    """Packed rows `start` to `stop`, which see the shared ones and their own piece's up to themselves.

    `begin` is where the first one's piece begins.
    """

    shared: range
    begin: int
    start: int
    stop: int

    @property
    def size(self) -> tuple[int, int]:
        """Keys and queries."""
        return len(self.shared) + self.stop - self.begin, self.stop - self.start


class Continued:
    """The rounds of pieces that continue another. Differentiable."""

    def __init__(self, starts: Tensor, before: Tensor) -> None:
        """`starts`: the first row of each piece and the number of rows, int64 [pieces + 1]; `before`: which piece
        each continues, itself for none, int64 [pieces].
        """
        lengths = starts.diff()
        begins = starts[:-1].repeat_interleave(lengths)
        shared = torch.where(before == torch.arange(len(before)), 0, lengths[before]).repeat_interleave(lengths)
        positions = torch.arange(len(begins)) - begins + shared
        rounds = zip_longest(*_families(starts.tolist(), before.tolist()))
        groups = [group for each in rounds for group in _grouped([block for block in each if block is not None])]
        self._rounds = {torch.device("cpu"): [_Round.of(group, begins, positions) for group in groups]}

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, others: tuple[Tensor, Tensor]
    ) -> Tensor:
        """As `Attention`. `others`: the rows that continue nothing, int64 [N], and what these got."""
        device = query.device
        if device not in self._rounds:
            self._rounds[device] = [each.to(device) for each in self._rounds[torch.device("cpu")]]
        found: Tensor = _Continue.apply(query, key, value, *others, self._rounds[device], layer)
        return found


def _families(starts: Sequence[int], before: Sequence[int]) -> list[list[_Block]]:
    """The blocks of each family, in order."""
    families: dict[int, list[_Block]] = {}
    for piece, ((start, stop), continues) in enumerate(zip(pairwise(starts), before, strict=True)):
        if piece == continues or start == stop:
            continue
        blocks = families.setdefault(continues, [])
        shared = range(starts[continues], starts[continues + 1])
        most = min(BLOCK_ROWS, max(LEAST_ROWS, len(shared) // 4))
        if blocks and stop - blocks[-1].begin <= most:
            blocks[-1] = blocks[-1]._replace(stop=stop)
            continue
        num_parts = -(-(stop - start) // BLOCK_ROWS)
        cuts = [start + (stop - start) * i // num_parts for i in range(num_parts + 1)]
        blocks += [_Block(shared, start, a, b) for a, b in pairwise(cuts)]
    return list(families.values())


def _grouped(blocks: Sequence[_Block]) -> list[list[_Block]]:
    """Blocks of similar size together."""
    groups: list[list[_Block]] = []
    for block in sorted(blocks, key=lambda block: block.size, reverse=True):
        if groups:
            together = [*groups[-1], block]
            sizes = [one.size for one in together]
            longest = max(keys for keys, _ in sizes) * max(queries for _, queries in sizes)
            if sum(keys * queries for keys, queries in sizes) >= (1 - MAX_PADDING) * longest * len(sizes):
                groups[-1] = together
                continue
        groups.append([block])
    return groups


@dataclass(frozen=True, kw_only=True)
class _Padded:
    """Packed rows of N blocks, int64 [N, longest], where padding repeats a block's last row.

    `rows` are those without padding, and `places` where they are among the N x longest.
    """

    whole: Tensor
    rows: Tensor
    places: Tensor

    @classmethod
    def of(cls, blocks: Sequence[Tensor]) -> _Padded:
        lengths = torch.tensor([len(rows) for rows in blocks])
        columns = torch.arange(int(lengths.max()))
        whole = torch.stack([rows[columns.clamp(max=len(rows) - 1)] for rows in blocks])
        real = columns < lengths.unsqueeze(1)
        return cls(whole=whole, rows=whole[real], places=real.flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> _Padded:
        return _Padded(whole=self.whole.to(device), rows=self.rows.to(device), places=self.places.to(device))

    def take(self, x: Tensor) -> Tensor:
        """[T, heads, dim] -> [N, longest, heads, dim]."""
        return x.index_select(0, self.whole.flatten()).unflatten(0, self.whole.shape)

    def real(self, x: Tensor) -> Tensor:
        """[N, longest, heads, dim] -> those of `rows`."""
        x = x.flatten(0, 1)
        return x if len(self.places) == len(x) else x.index_select(0, self.places)

    def spread(self, x: Tensor) -> Tensor:
        """[T, heads, dim] -> [N, longest, heads, dim], zeros for padding."""
        if len(self.places) == self.whole.numel():
            return self.take(x)
        padded = x.new_zeros(self.whole.numel(), *x.shape[1:])
        return padded.index_copy_(0, self.places, x.index_select(0, self.rows)).unflatten(0, self.whole.shape)


@dataclass(frozen=True, kw_only=True)
class _Round:
    """Blocks of which no two have a row in common.

    A key is seen by rows from `since` on whose piece begins at `until` or earlier, and windows reach back by
    positions; all int32 [N, queries] or [N, keys].
    """

    queries: _Padded
    keys: _Padded
    begins: Tensor
    since: Tensor
    until: Tensor
    query_positions: Tensor
    key_positions: Tensor

    @classmethod
    def of(cls, blocks: Sequence[_Block], begins: Tensor, positions: Tensor) -> _Round:
        """Of each packed row: `begins`, the first row of its piece, and `positions`, its place in its sequence."""
        queries = _Padded.of([torch.arange(block.start, block.stop) for block in blocks])
        keys = _Padded.of([torch.tensor([*block.shared, *range(block.begin, block.stop)]) for block in blocks])
        shared = keys.whole < torch.tensor([[block.shared.stop] for block in blocks])
        since = torch.full((keys.whole.numel(),), _NEVER)
        since[keys.places] = torch.where(shared, 0, keys.whole).flatten()[keys.places]
        return cls(
            queries=queries,
            keys=keys,
            begins=begins[queries.whole].int(),
            since=since.view(shared.shape).int(),
            until=torch.where(shared, _NEVER, keys.whole).int(),
            query_positions=positions[queries.whole].int(),
            key_positions=positions[keys.whole].int(),
        )

    def to(self, device: torch.device) -> _Round:
        return _Round(**{name: part.to(device) for name, part in vars(self).items()})

    def visible(self, window: int | None) -> Tensor:
        """Which queries see which keys, bool [N, queries, keys]."""
        rows = self.queries.whole.int().unsqueeze(2)
        found = self.since.unsqueeze(1) <= rows
        found &= self.until.unsqueeze(1) >= self.begins.unsqueeze(2)
        if window is not None:
            found &= self.key_positions.unsqueeze(1) > self.query_positions.unsqueeze(2) - window
        return found

    def take(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """The rows that ask, and those that they may see, [N, longest, heads, dim] each."""
        return [self.queries.take(query), self.keys.take(key), self.keys.take(value)]

    def attend(self, layer: AttentionLayer, parts: Sequence[Tensor]) -> Tensor:
        """What each of `take`'s queries gets, [N, longest, heads, dim]."""
        wide = [x.float() if x.device.type == "cpu" else x for x in parts]  # faster there: see MAX_UPCAST_LENGTH
        query, key, value = (x.transpose(1, 2) for x in wide)
        attended = masked_attention(query, key, value, self.visible(layer.window), layer)
        return attended.transpose(1, 2).to(parts[0].dtype)


class _Continue(Function):
    """See `Continued`. Of the rounds nothing is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        other_rows: Tensor,
        others: Tensor,
        rounds: Sequence[_Round],
        layer: AttentionLayer,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, other_rows)
        ctx.rounds, ctx.layer = rounds, layer
        out = torch.empty_like(query).index_copy_(0, other_rows, others)
        for each in rounds:
            attended = each.attend(layer, each.take(query, key, value))
            out.index_copy_(0, each.queries.rows, each.queries.real(attended))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, other_rows = ctx.saved_tensors
        to_query = torch.zeros_like(query)
        sums = [x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (key, value)]
        for each in ctx.rounds:
            parts = [x.requires_grad_() for x in each.take(query, key, value)]
            with torch.enable_grad():
                attended = each.attend(ctx.layer, parts)
            found = torch.autograd.grad(attended, parts, each.queries.spread(grad))
            to_query.index_copy_(0, each.queries.rows, each.queries.real(found[0]))
            for total, part in zip(sums, found[1:], strict=True):
                rows = each.keys.rows
                total.index_copy_(0, rows, total.index_select(0, rows).add_(each.keys.real(part)))
        to_key, to_value = (total.to(x.dtype) for total, x in zip(sums, (key, value), strict=True))
        return to_query, to_key, to_value, None, grad.index_select(0, other_rows), None, None
