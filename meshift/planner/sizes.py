"""How many numbers of a model each rank of a layout holds, by stage, from the shard table.

Parameters that are cut alike are counted together, so that a model of 80 layers costs no more than one of 2. It
knows nothing of bytes, of time or of devices.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from meshift.layout.boxes import held_box, num_elements
from meshift.layout.layout import Coordinates, Layout
from meshift.layout.shard import Shard
from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.shards import is_adapters, shard_table


class Held(NamedTuple):
    """Numbers that a rank holds: those that are never trained, and those that are."""

    frozen: int
    trained: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.frozen + self.trained


@dataclass(frozen=True)
class Pattern:
    """Parameters of one shape and cut: how many there are in each layer, or outside of layers (`layers` empty).

    `is_summed`: matrices beside adapters, with which generation multiplies as one. `learns`: they do in a role
    that is trained, but for layers that are frozen.
    """

    shard: Shard
    count: int
    layers: tuple[int, ...] = ()
    is_adapter: bool = False
    is_summed: bool = False
    learns: bool = True


class Sizes:
    """Of one model. `trained` is false for a role without updates: all it holds is then frozen."""

    def __init__(
        self, config: DecoderConfig, head: HeadKind, *, trained: bool = False, num_frozen_layers: int = 0
    ) -> None:
        self.config = config
        self.head: HeadKind = head
        self._trained, self._num_frozen = trained, num_frozen_layers
        self._found: dict[tuple[int, ...], Held] = {}

    @cached_property
    def patterns(self) -> tuple[Pattern, ...]:
        """All parameters, those of all layers that are alike together."""
        found: dict[tuple[object, ...], list[tuple[str, Shard]]] = defaultdict(list)
        for name, shard in shard_table(self.config, self.head).items():
            key = is_adapters(name), self._is_summed(name, shard), self._learns(name, shard)
            found[shard.shape, shard.split, shard.stage, shard.tied, *key].append((name, shard))
        return tuple(map(self._pattern, found.values()))

    def _pattern(self, alike: Sequence[tuple[str, Shard]]) -> Pattern:
        layers = tuple(sorted({shard.layer for _, shard in alike if shard.layer is not None}))
        name, shard = alike[0]
        return Pattern(
            shard=shard,
            count=len(alike) // max(1, len(layers)),
            layers=layers,
            is_adapter=is_adapters(name),
            is_summed=self._is_summed(name, shard),
            learns=self._learns(name, shard),
        )

    @property
    def frozen_names(self) -> list[str]:
        """Parameters of the model that a role which is trained does not change."""
        return [
            name
            for name, shard in shard_table(self.config, self.head).items()
            if not self._learns(name, shard) or (shard.layer is not None and shard.layer < self._num_frozen)
        ]

    def _is_summed(self, name: str, shard: Shard) -> bool:
        adapter, layer = self.config.adapter, shard.layer
        if adapter is None or layer is None or not name.endswith(".weight"):
            return False
        return adapter.rank_at(layer, name.removeprefix(f"layers.{layer}.").removesuffix(".weight")) > 0

    def _learns(self, name: str, shard: Shard) -> bool:
        """As `training.optimizer.is_trained` says, with layers that are frozen left to `copies`."""
        if self.config.adapter is not None:
            return self._trained and (is_adapters(name) or (self.head != "lm" and name == "head.weight"))
        return self._trained and not (self._num_frozen > 0 and shard.stage == "embedding")

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.config.num_layers

    def held(self, layout: Layout, where: Coordinates) -> Held:
        """What the rank at these coordinates keeps."""
        key = (
            *(layout.tensor, where.tensor, layout.pipeline, where.pipeline),
            *((layout.data, where.data) if layout.sharded else (0, 0)),
        )
        if key not in self._found:
            counts = [0, 0]
            for pattern in self.patterns:
                each = num_elements(held_box(pattern.shard, layout, where)) * pattern.count
                for trained, copies in enumerate(self.copies(pattern, layout, where)):
                    counts[trained] += each * copies
            self._found[key] = Held(*counts)
        return self._found[key]

    def copies(self, pattern: Pattern, layout: Layout, where: Coordinates) -> tuple[int, int]:
        """How many layers (or, outside of layers, 0 or 1) of the pattern are here, frozen and trained."""
        if pattern.layers:
            here = layout.stage_layers(self.num_layers)[where.pipeline]
            trained = self._count(pattern, here, everything=False)
            return self._count(pattern, here, everything=True) - trained, trained
        stage = pattern.shard.stage
        is_here = where.pipeline == (0 if stage == "embedding" else layout.pipeline - 1)
        is_here = is_here or (pattern.shard.tied and where.pipeline == layout.pipeline - 1)
        trained = is_here and pattern.learns
        return int(is_here and not trained), int(trained)

    def layer(self, layout: Layout, where: Coordinates) -> int:
        """Numbers of one layer, with what data ranks share out brought together; without adapters."""
        return self._layer(layout, where, adapters=False)

    def layer_adapters(self, layout: Layout, where: Coordinates) -> int:
        """Numbers of the adapters of one layer that has some."""
        return 0 if self.config.adapter is None else self._layer(layout, where, adapters=True)

    def adapters(self, layout: Layout, where: Coordinates) -> int:
        """Numbers of all adapters that the rank keeps."""
        return self._all(layout, where, lambda pattern: pattern.is_adapter)

    def summed(self, layout: Layout, where: Coordinates) -> int:
        """Numbers of the matrices that are beside adapters here."""
        return self._all(layout, where, lambda pattern: pattern.is_summed)

    def _all(self, layout: Layout, where: Coordinates, wanted: Callable[[Pattern], bool]) -> int:
        return sum(
            num_elements(held_box(p.shard, layout, where)) * p.count * sum(self.copies(p, layout, where))
            for p in self.patterns
            if wanted(p)
        )

    def _layer(self, layout: Layout, where: Coordinates, *, adapters: bool) -> int:
        """Of the last layer, which has adapters if any has; a matrix is of another pattern where it has none."""
        whole = Layout(data=layout.data, tensor=layout.tensor, pipeline=layout.pipeline)
        return sum(
            num_elements(held_box(p.shard, whole, where)) * p.count
            for p in self.patterns
            if p.is_adapter == adapters and p.layers and p.layers[-1] == self.num_layers - 1
        )

    def largest(self, layout: Layout, where: Coordinates) -> int:
        """Numbers of the largest trained parameter that is kept here."""
        return max(
            (
                num_elements(held_box(pattern.shard, layout, where))
                for pattern in self.patterns
                if self.copies(pattern, layout, where)[1]
            ),
            default=0,
        )

    def kept_twice(self, home: Layout, at_home: Coordinates | None, other: Layout, there: Coordinates) -> int:
        """Numbers that a device which stands in two placements of a role keeps beside those of the first.

        A trained parameter with the same box in both is one tensor; frozen ones are not sent, and have their own.
        """
        if at_home is None:
            return self.held(other, there).total
        total = 0
        for pattern in self.patterns:
            box = held_box(pattern.shard, other, there)
            frozen, trained = self.copies(pattern, other, there)
            if box == held_box(pattern.shard, home, at_home):
                trained -= self.copies_in_both(pattern, (home, at_home), (other, there))
            total += num_elements(box) * pattern.count * (frozen + trained)
        return total

    def copies_in_both(
        self,
        pattern: Pattern,
        one: tuple[Layout, Coordinates],
        other: tuple[Layout, Coordinates],
        *,
        everything: bool = False,
    ) -> int:
        """Trained layers (or 0 or 1) of the pattern that are here in both layouts; or `everything`."""
        if not pattern.layers:
            counts = [self.copies(pattern, *where) for where in (one, other)]
            return min(trained + frozen * everything for frozen, trained in counts)
        mine, theirs = (layout.stage_layers(self.num_layers)[where.pipeline] for layout, where in (one, other))
        shared = range(max(mine.start, theirs.start), min(mine.stop, theirs.stop))
        return self._count(pattern, shared, everything=everything)

    def _count(self, pattern: Pattern, here: range, *, everything: bool) -> int:
        """Layers of the pattern among these: the trained ones, or all."""
        if not (everything or pattern.learns):
            return 0
        first = here.start if everything else max(here.start, self._num_frozen)
        return max(0, bisect_left(pattern.layers, here.stop) - bisect_left(pattern.layers, first))
