"""How one parameter may be cut: its shape, the dim and units between which tensor ranks cut it, its stage.

The types of the shard table (`models/shards.py` fills it) and the arithmetic of tensor cuts. Knows nothing of
models, meshes or tensors.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal

from meshift.errors import LayoutError

Group = Literal["heads", "kv_heads", "mlp_columns", "vocabulary"]
Stage = Literal["embedding", "layer", "head"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A parameter is cut along `dim`, only between units of `unit` rows; `num_units` units make the whole.

    Parameters of one `group` are cut at the same units, since their results meet unit by unit: a gate column
    with its up and down columns. So are `heads` and `kv_heads`: `queries_per_kv` query heads read each
    key-value head, and every part has its query heads' key-value heads, shared evenly.

    Example: a query projection of 9 heads of 64 rows, three to a key-value head, is
    `Split(dim=0, unit=64, num_units=9, group="heads", queries_per_kv=3)`.
    """

    dim: int
    unit: int
    num_units: int
    group: Group
    queries_per_kv: int = 1

    def bounds(self, part: int, num_parts: int) -> tuple[int, int]:
        """Rows [start, stop) of one of `num_parts` parts; see `units`."""
        start, stop = self.units(part, num_parts)
        return start * self.unit, stop * self.unit

    def units(self, part: int, num_parts: int) -> tuple[int, int]:
        """Units [start, stop) of one of `num_parts` parts; the parts of two numbers are equal or disjoint.

        Columns and vocabulary rows are shared out evenly, earlier parts holding one more where they do not
        divide. Heads go by key-value heads: while there are enough, each part gets whole ones, with all their
        query heads. Beyond, each key-value head is held by several parts (`sharers`), which share out its query
        heads. Raises `LayoutError` where a part would get nothing, `ValueError` for a part that is none.
        """
        if not 0 <= part < num_parts:
            raise ValueError(f"There is no part {part} of {num_parts}.")
        most = self.num_units * self.queries_per_kv if self.group == "kv_heads" else self.num_units
        if num_parts > most:
            name = {"heads": "query heads", "kv_heads": "query heads", "mlp_columns": "MLP columns"}
            raise LayoutError(
                f"{most} {name.get(self.group, 'vocabulary rows')} cannot be cut into {num_parts} parts; "
                f"use t{most} or less."
            )
        if self.group not in ("heads", "kv_heads"):
            return share_out(self.num_units, part, num_parts)
        return self._heads(part, num_parts)

    def sharers(self, part: int, num_parts: int) -> range:
        """The parts that hold the same units as this one, itself included: more than one for key-value heads
        that are fewer than parts. Their gradients are sums over these parts.
        """
        if self.group != "kv_heads" or num_parts <= self.num_units:
            return range(part, part + 1)
        return range(*share_out(num_parts, _owner(self.num_units, part, num_parts), self.num_units))

    def _heads(self, part: int, num_parts: int) -> tuple[int, int]:
        per_kv = self.queries_per_kv
        num_kv_heads = self.num_units if self.group == "kv_heads" else self.num_units // per_kv
        if num_parts <= num_kv_heads:
            start, stop = share_out(num_kv_heads, part, num_parts)
            return (start, stop) if self.group == "kv_heads" else (start * per_kv, stop * per_kv)
        kv_head = _owner(num_kv_heads, part, num_parts)
        if self.group == "kv_heads":
            return kv_head, kv_head + 1
        first, after = share_out(num_parts, kv_head, num_kv_heads)
        start, stop = share_out(per_kv, part - first, after - first)
        return kv_head * per_kv + start, kv_head * per_kv + stop


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One parameter: its full shape, its cut (None: each tensor rank holds all of it), its pipeline stage.

    `layer` is the index for stage `layer`, else None. `tied` marks an embedding that the head reads too: the
    first and the last stage each hold it.
    """

    shape: tuple[int, ...]
    split: Split | None
    stage: Stage
    layer: int | None = None
    tied: bool = False

    @property
    def num_elements(self) -> int:
        """Numbers in the whole parameter."""
        return prod(self.shape)


def share_out(count: int, part: int, num_parts: int) -> tuple[int, int]:
    """[start, stop) of a part, where `count` things are shared out in order; earlier parts have one more."""
    each, left = divmod(count, num_parts)
    start = part * each + min(part, left)
    return start, start + each + (part < left)


def _owner(num_owners: int, part: int, num_parts: int) -> int:
    """Which owner a part belongs to, where `share_out` shares out `num_parts` parts to `num_owners`."""
    each, left = divmod(num_parts, num_owners)
    larger = left * (each + 1)
    return part // (each + 1) if part < larger else left + (part - larger) // each
