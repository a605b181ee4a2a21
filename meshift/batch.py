"""The one currency between model calls: ragged sequences, packed end to end, never padded.

A `Batch` has one row per sequence. Under each key it holds one `Ragged` tensor: all rows' values one after
another, with a length per row. It knows nothing of models, roles or what the keys mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

_LENGTHS = ".lengths"
_COLUMN = "column/"
WHERE = "where"
"""The column that names each row's place in the data (`hh.jsonl:4`), in batches that have it."""


def column_key(name: str) -> str:
    """The key of a data column in a batch: `answer` is `column/answer`, so that no data can hide a field."""
    return _COLUMN + name


@dataclass(frozen=True, eq=False)
class Ragged:
    """Values of n rows, packed: rows [1, 2, 3] and [4] are `values=[1, 2, 3, 4]`, `lengths=[3, 1]`.

    `values` is [total, ...]; `lengths` is int64 [n] on the CPU and sums to total.
    """

    values: Tensor
    lengths: Tensor

    def __post_init__(self) -> None:
        if self.lengths.dtype != torch.int64 or self.lengths.dim() != 1:
            raise ValueError(f"lengths must be int64 [n], not {self.lengths.dtype} {tuple(self.lengths.shape)}")
        if int(self.lengths.sum()) != self.values.shape[0]:
            raise ValueError(
                f"lengths sum to {int(self.lengths.sum())}, but there are {self.values.shape[0]} values"
            )

    @staticmethod
    def from_rows(rows: Sequence[Any], dtype: torch.dtype | None = None) -> Ragged:
        """Pack a list of 1-D rows (lists, arrays or tensors)."""
        tensors = [torch.as_tensor(row, dtype=dtype) for row in rows]
        lengths = torch.tensor([t.shape[0] for t in tensors], dtype=torch.int64)
        return Ragged(torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype), lengths)

    @staticmethod
    def scalars(values: Any, dtype: torch.dtype | None = None) -> Ragged:
        """One value per row."""
        tensor = torch.as_tensor(values, dtype=dtype)
        return Ragged(tensor, torch.ones(tensor.shape[0], dtype=torch.int64))

    def __len__(self) -> int:
        return int(self.lengths.shape[0])

    @property
    def starts(self) -> Tensor:
        """Index of each row's first value, int64 [n]."""
        return torch.cumsum(self.lengths, 0) - self.lengths

    @property
    def row_ids(self) -> Tensor:
        """The row that each value belongs to, int64 [total]."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    def rows(self) -> list[Tensor]:
        """The rows as views of the packed values."""
        return list(torch.split(self.values, self.lengths.tolist()))

    def index(self, rows: Tensor) -> Ragged:
        """The named rows, in the order given."""
        lengths = self.lengths[rows]
        values = self.values[ranges(self.starts[rows], lengths).to(self.values.device)]
        return Ragged(values, lengths)

    def drop_last(self) -> Ragged:
        """All but the last value of every row; rows must not be empty."""
        keep = torch.ones(self.values.shape[0], dtype=torch.bool)
        keep[self.starts + self.lengths - 1] = False
        return Ragged(self.values[keep.to(self.values.device)], self.lengths - 1)

    def sum_rows(self) -> Tensor:
        """Sum of each row's values, [n, ...] in the values' dtype."""
        out = self.values.new_zeros((len(self), *self.values.shape[1:]))
        return out.index_add_(0, self.row_ids.to(self.values.device), self.values)


def ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """`start, start + 1, ..., start + length - 1` of every row, concatenated; int64 [sum of lengths]."""
    total = int(lengths.sum())
    offsets = torch.cumsum(lengths, 0) - lengths
    return torch.arange(total) + torch.repeat_interleave(starts - offsets, lengths)


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of several `Ragged` tensors, and of plain columns.

    `columns` holds one JSON value per row (texts, labels: what a reward function is given). Raises `ValueError`
    for a name that is both a field and a column, and for a field whose name ends in `.lengths`.

    >>> batch = Batch({"tokens": Ragged.from_rows([[5, 6, 7], [8]]), "scores": Ragged.scalars([0.5, -1.0])})
    >>> len(batch), batch["tokens"].lengths.tolist()
    (2, [3, 1])
    """

    fields: Mapping[str, Ragged]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        twice = sorted(set(self.fields) & set(self.columns))
        if twice:
            raise ValueError(f"{twice[0]!r} is both a field and a column of a batch; rename one")
        reserved = sorted(key for key in self.fields if key.endswith(_LENGTHS))
        if reserved:
            raise ValueError(f"no field of a batch may end in {_LENGTHS!r}, as {reserved[0]!r} does; rename it")
        sizes = {key: len(value) for key, value in self.fields.items()}
        sizes |= {key: len(value) for key, value in self.columns.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"every key of a batch needs the same number of rows, not {sizes}")

    def __len__(self) -> int:
        if self.fields:
            return len(next(iter(self.fields.values())))
        return len(next(iter(self.columns.values()), ()))

    def __getitem__(self, key: str) -> Ragged:
        if key not in self.fields:
            raise KeyError(f"the batch has no key {key!r}; it has {sorted(self.fields)}")
        return self.fields[key]

    def __contains__(self, key: str) -> bool:
        return key in self.fields or key in self.columns

    def select(self, keys: Iterable[str]) -> Batch:
        """Only the named keys; a key that is absent raises `KeyError`."""
        fields, columns = {}, {}
        for key in keys:
            if key in self.columns:
                columns[key] = self.columns[key]
            else:
                fields[key] = self[key]
        return Batch(fields, columns)

    def union(self, other: Batch) -> Batch:
        """All keys of both; the other's win."""
        return Batch({**self.fields, **other.fields}, {**self.columns, **other.columns})

    def index(self, rows: Sequence[int] | Tensor) -> Batch:
        """The named rows, in the order given."""
        picked = torch.as_tensor(rows, dtype=torch.int64)
        fields = {key: value.index(picked) for key, value in self.fields.items()}
        columns = {key: [value[i] for i in picked.tolist()] for key, value in self.columns.items()}
        return Batch(fields, columns)

    def split(self, parts: Sequence[Sequence[int]]) -> list[Batch]:
        """One batch per list of rows."""
        return [self.index(part) for part in parts]

    @staticmethod
    def concat(batches: Sequence[Batch]) -> Batch:
        """Rows of all batches, in order; they must hold the same keys."""
        first = batches[0]
        if any(set(b.fields) != set(first.fields) or set(b.columns) != set(first.columns) for b in batches):
            raise ValueError(f"batches hold different keys: {[sorted(b.fields) for b in batches]}")
        fields = {
            key: Ragged(
                torch.cat([b.fields[key].values for b in batches]),
                torch.cat([b.fields[key].lengths for b in batches]),
            )
            for key in first.fields
        }
        columns = {key: [item for b in batches for item in b.columns[key]] for key in first.columns}
        return Batch(fields, columns)

    def to_bytes(self) -> bytes:
        """The batch in the safetensors format; columns travel as JSON in its header."""
        tensors: dict[str, Tensor] = {}
        memory: set[int] = set()
        for key, value in self.fields.items():
            for name, tensor in ((key, value.values), (key + _LENGTHS, value.lengths)):
                address = tensor.untyped_storage().data_ptr()
                # Fields often share their lengths; the format refuses tensors that share memory.
                tensors[name] = (tensor.clone() if address in memory else tensor).contiguous()
                memory.add(address)
        return save_tensors(tensors, metadata={"columns": json.dumps(dict(self.columns))})

    @staticmethod
    def from_bytes(data: bytes) -> Batch:
        """The batch that `to_bytes` wrote."""
        tensors = load_tensors(data)
        header_size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + header_size])
        keys = [key for key in tensors if not key.endswith(_LENGTHS)]
        fields = {key: Ragged(tensors[key], tensors[key + _LENGTHS]) for key in keys}
        return Batch(fields, json.loads(header["__metadata__"]["columns"]))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call gives: new keys for the batch, and numbers to log."""

    batch: Batch = field(default_factory=lambda: Batch({}))
    metrics: Mapping[str, float] = field(default_factory=dict)


def balanced_partition(sizes: Sequence[int], num_parts: int) -> list[list[int]]:
    """Items in `num_parts` parts of nearly equal total size (largest first, to the lightest part).

    Parts list their items in ascending order; with fewer items than parts some parts are empty.
    The largest part is at most 4/3 of the best possible (Graham 1969).
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    totals = [0] * num_parts
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        lightest = min(range(num_parts), key=lambda p: (totals[p], len(parts[p]), p))
        parts[lightest].append(item)
        totals[lightest] += sizes[item]
    return [sorted(part) for part in parts]


def micro_batches(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Items in as few balanced parts as keep each part within `max_tokens`.

    An item that alone exceeds the budget gets a part of its own.
    """
    num_parts = max(1, -(-sum(sizes) // max_tokens))
    while num_parts < len(sizes):
        parts = balanced_partition(sizes, num_parts)
        if all(len(part) == 1 or sum(sizes[i] for i in part) <= max_tokens for part in parts):
            return parts
        num_parts += 1
    return [[i] for i in range(len(sizes))]
