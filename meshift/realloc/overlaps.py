"""Where the boxes of two layouts meet: parameters that are cut alike are looked at once, as one pattern.

A model of 80 layers has some ten kinds of parameters; layers that lie on the same stages in both layouts share
their overlaps. Knows nothing of devices, of who sends, or of bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from meshift.layout.boxes import Box, Cells, Interval, cells_of, count_layers, stages_of
from meshift.layout.layout import Layout
from meshift.layout.shard import Shard, Split


class Overlap(NamedTuple):
    """A box of the source's grid, one of the target's, and what they have in common."""

    held: Box
    wanted: Box
    box: Box


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Parameters that are cut alike and lie on the same stages, in both layouts."""

    names: tuple[str, ...]
    held: Cells
    wanted: Cells

    def overlaps(self) -> Iterator[Overlap]:
        """The pairs of boxes that have something in common; each number of the parameter is in one of them.

        Both sides are grids, so overlaps are found dim by dim.
        """
        num_dims = len(next(iter(self.held)))
        dims = [list(_meet(_intervals(self.held, d), _intervals(self.wanted, d))) for d in range(num_dims)]
        for along in product(*dims):
            held, wanted, box = zip(*along, strict=True)
            yield Overlap(held, wanted, box)


_Cut = tuple[tuple[int, ...], Split | None, tuple[int, ...]]  # shape, split, stages


def find_patterns(
    source: Layout, target: Layout, shards: Mapping[str, Shard], names: Sequence[str]
) -> list[Pattern]:
    """The parameters called `names`, grouped, in the order of the table. Raises `LayoutError` as boxes do."""
    num_layers = count_layers(shards)
    groups: dict[tuple[_Cut, _Cut], list[str]] = {}
    stages = _Stages(source, num_layers), _Stages(target, num_layers)
    for name in names:
        shard = shards[name]
        held, wanted = ((shard.shape, shard.split, at.of(shard)) for at in stages)
        groups.setdefault((held, wanted), []).append(name)
    grids: dict[tuple[int, _Cut], Cells] = {}
    for cuts, group in groups.items():
        for side, layout in enumerate((source, target)):
            if (side, cuts[side]) not in grids:
                grids[side, cuts[side]] = cells_of(shards[group[0]], layout, cuts[side][2])
    return [
        Pattern(names=tuple(group), held=grids[0, held], wanted=grids[1, wanted])
        for (held, wanted), group in groups.items()
        if grids[0, held]
    ]


class _Stages:
    """Which stages hold a parameter, worked out once for each layer."""

    def __init__(self, layout: Layout, num_layers: int) -> None:
        layout.stage_layers(num_layers)  # a layout that the model is too small for is refused, whatever is asked
        self._layout, self._num_layers = layout, num_layers
        self._known: dict[tuple[str, int | None, bool], tuple[int, ...]] = {}

    def of(self, shard: Shard) -> tuple[int, ...]:
        place = shard.stage, shard.layer, shard.tied
        if place not in self._known:
            self._known[place] = stages_of(shard, self._layout, self._num_layers)
        return self._known[place]


def _intervals(cells: Cells, dim: int) -> list[Interval]:
    return sorted({box[dim] for box in cells})


def _meet(held: Sequence[Interval], wanted: Sequence[Interval]) -> Iterator[tuple[Interval, Interval, Interval]]:
    """Two rows of intervals that cover the same dim, walked together: those that overlap, and where."""
    i = j = 0
    while i < len(held) and j < len(wanted):
        yield held[i], wanted[j], (max(held[i][0], wanted[j][0]), min(held[i][1], wanted[j][1]))
        held_ends, wanted_ends = held[i][1], wanted[j][1]
        i += held_ends <= wanted_ends
        j += wanted_ends <= held_ends
