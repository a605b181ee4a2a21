"""Rows that several sequences begin with run once: which those are, and how a packed batch is laid out for it.

Completions of one prompt and the two texts of a pair have a prompt in common. In a causal model its hidden states
do not depend on what follows, so that one copy serves all of them, and its gradient is the sum of theirs. It knows
nothing of readings, losses or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from meshift.batch import Ragged, micro_batches, ranges
from meshift.models.attention import packed_positions

MIN_SHARED = 16
"""Fewer rows in common (a start token, a few words of a template) are not worth a piece of their own."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Sequences that begin with the same `num_shared` tokens."""

    members: Sequence[int]
    num_shared: int


@dataclass(frozen=True, kw_only=True)
class Arranged:
    """How packed sequences run: in pieces, of which some continue another (see `PackedAttention`).

    `take` is int64 [rows that run], the packed row that each is; `place` is int64 [packed rows], where each runs.
    `before[i]` is the piece that piece i continues, itself for none.
    """

    take: Tensor
    place: Tensor
    positions: Tensor
    lengths: list[int]
    before: list[int]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of each piece, the rows that come before it and its own."""
        pieces = enumerate(zip(self.before, self.lengths, strict=True))
        return [(self.lengths[before] if before != i else 0, own) for i, (before, own) in pieces]


def arrange(sequences: Ragged, *, share: bool) -> Arranged:
    """The pieces of packed sequences; with `share`, common beginnings once, else every sequence whole."""
    lengths = sequences.lengths.tolist()
    found = families(sequences) if share else []
    if not found:
        rows = torch.arange(len(sequences.values))
        positions = packed_positions(lengths)
        return Arranged(
            take=rows, place=rows, positions=positions, lengths=lengths, before=list(range(len(lengths)))
        )
    starts = sequences.starts.tolist()
    alone = set(range(len(lengths))).difference(*(family.members for family in found))
    pieces: list[tuple[int, int]] = []  # first row and length
    before: list[int] = []
    place = torch.empty(len(sequences.values), dtype=torch.int64)
    num_rows = 0
    for family in [*found, *(Family(members=[i], num_shared=lengths[i]) for i in sorted(alone))]:
        shared, first = family.num_shared, len(pieces)
        pieces.append((starts[family.members[0]], shared))
        before.append(first)
        at = torch.arange(num_rows, num_rows + shared)
        num_rows += shared
        for member in family.members:
            place[starts[member] : starts[member] + shared] = at
            rest = lengths[member] - shared
            if rest:
                pieces.append((starts[member] + shared, rest))
                before.append(first)
                place[starts[member] + shared : starts[member] + lengths[member]] = torch.arange(rest) + num_rows
                num_rows += rest
    take = ranges(*torch.tensor(pieces).unbind(1))
    positions = packed_positions(lengths)[take]
    return Arranged(take=take, place=place, positions=positions, lengths=[own for _, own in pieces], before=before)


def share_in_micro_batches(
    sequences: Ragged, sizes: Sequence[int], max_tokens: int, *, read: Tensor, share: bool
) -> list[list[int]]:
    """Rows of a batch in balanced micro-batches, those that share a beginning together where they fit.

    `sequences` has one or several sequences a row: the first ones of all rows, then the second ones, and so on;
    `read` is int64, the packed rows of them that the head reads. A micro-batch's budget counts the rows that run,
    or those that are read, if these are more: a shared row is read once for every sequence.
    """
    num_rows = len(sizes)
    if not share or not num_rows:
        return micro_batches(sizes, max_tokens)
    per_row = len(sequences) // num_rows
    reads = (sequences.row_ids[read] % num_rows).bincount(minlength=num_rows).tolist()
    found = families(sequences.index(torch.arange(num_rows)))
    alone = set(range(num_rows)).difference(*(family.members for family in found))
    pending = [*(list(family.members) for family in found), *([row] for row in sorted(alone))]
    items: list[tuple[list[int], int]] = []
    while pending:
        rows = pending.pop()
        every = [row + part * num_rows for part in range(per_row) for row in rows]
        together = sequences.index(torch.tensor(every))
        running = sum(sizes[row] for row in rows) - sum(_saved(family) for family in families(together))
        cost = max(running, sum(reads[row] for row in rows))
        if cost <= max_tokens or len(rows) == 1:
            items.append((rows, cost))
        else:
            half = len(rows) // 2
            pending += [rows[:half], rows[half:]]
    items.sort()
    parts = micro_batches([cost for _, cost in items], max_tokens)
    return [sorted(row for item in part for row in items[item][0]) for part in parts]


def families(sequences: Ragged) -> list[Family]:
    """Which sequences share what beginning, so that the fewest rows run; each is in one family at most."""
    rows = [row.tolist() for row in sequences.rows()]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    alike = [_num_alike(rows[a], rows[b]) for a, b in pairwise(order)]
    return sorted(_best(order, alike), key=lambda family: family.members[0])


def _best(order: Sequence[int], alike: Sequence[int]) -> list[Family]:
    """Families of sorted sequences, of which neighbours have `alike` tokens in common.

    Neighbours that share so many tokens or more are a run. From the inside out: a run's sequences without family
    become one, together with the families within that save less by themselves. What that misses of the best choice
    is a few rows where beginnings are nested.
    """
    runs: list[tuple[int, list[Family], list[int]]] = []  # still open: tokens shared, families, sequences without
    for place, shared in enumerate([*alike, -1]):
        within, alone = list[Family](), [order[place]]
        while runs and runs[-1][0] > shared:
            num_shared, others, before = runs.pop()
            within, alone = _grown([*others, *within], [*before, *alone], num_shared)
        if runs and runs[-1][0] == shared:
            runs[-1][1].extend(within)
            runs[-1][2].extend(alone)
        else:
            runs.append((shared, within, alone))
    return runs[-1][1]


def _grown(within: list[Family], alone: list[int], num_shared: int) -> tuple[list[Family], list[int]]:
    """The families of a run that shares so many tokens, and which of its sequences are in none."""
    joining = [family for family in within if len(family.members) * num_shared > _saved(family)]
    whole = Family(
        members=sorted([*alone, *(i for family in joining for i in family.members)]), num_shared=num_shared
    )
    if num_shared < MIN_SHARED or _saved(whole) <= sum(map(_saved, joining)):
        return within, alone
    return [*(family for family in within if family not in joining), whole], []


def _saved(family: Family) -> int:
    """Rows that need not run."""
    return (len(family.members) - 1) * family.num_shared


def _num_alike(one: Sequence[int], other: Sequence[int]) -> int:
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
