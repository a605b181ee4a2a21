"""Seconds of moving a role's parameters between two layouts, by the bytes that `realloc.plan` would send.

Bytes are counted by patterns of the shard table, rank by rank, without a plan: a search asks for thousands of
pairs. A test holds them equal to the plans'. It knows nothing of when anything moves.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshift.layout.boxes import held_box, num_elements
from meshift.layout.layout import Coordinates, Layout
from meshift.planner.cost import Costs
from meshift.planner.hardware import Hardware
from meshift.planner.memory import FP32, Memory
from meshift.planner.rates import rates_of
from meshift.planner.sizes import Pattern, Sizes

MAX_RANKS = 16
"""Of a larger target so many ranks are looked at, evenly spaced; their mean stands for all."""
CHECK_PASSES = 2
"""Times that what is held is read for fingerprints, on both sides together."""
MESSAGES, SMALL_MESSAGE = 5, 16384
"""That processes exchange around a move: two barriers, fingerprints, versions (two); and two for a probe."""


@dataclass(frozen=True)
class Missing:
    """Numbers that a target's ranks must be sent: the most of any, and of all together."""

    most: int
    total: float


class Moving:
    """Of one role. `shift` is where the target's first device stands in the home's mesh; None: elsewhere."""

    def __init__(self, memory: Memory, hardware: Hardware) -> None:
        self.memory, self.hardware = memory, hardware
        self._missing: dict[tuple[Layout | None, Layout, int | None, bool], Missing] = {}
        self._found: dict[tuple[object, ...], int] = {}

    def missing(self, home: Layout, target: Layout, shift: int | None, *, everything: bool = False) -> Missing:
        """Numbers of trained parameters (or of all) that target devices do not hold at home."""
        key = None if shift is None else home, target, shift, everything
        if key not in self._missing:
            step = max(1, target.num_ranks // MAX_RANKS)
            ranks = range(0, target.num_ranks, step)
            found = [self._of_rank(home, target, rank, shift, everything) for rank in ranks]
            self._missing[key] = Missing(max(found), sum(found) * target.num_ranks / len(found))
        return self._missing[key]

    def _of_rank(self, home: Layout, target: Layout, rank: int, shift: int | None, everything: bool) -> int:
        there = target.coordinates(rank)
        own = None if shift is None else rank + shift
        at_home = home.coordinates(own) if own is not None and 0 <= own < home.num_ranks else None
        key = _cut(home, at_home), _cut(target, there), everything
        if key not in self._found:
            sizes = self.memory.sizes
            self._found[key] = sum(
                _absent(sizes, pattern, (home, at_home), (target, there), everything) for pattern in sizes.patterns
            )
        return self._found[key]

    def seconds(
        self, home: Layout, target: Layout, shift: int | None, *, far: bool, generates: bool = False
    ) -> float:
        """Of bringing new weights to the target and checking them; `far`: the two meshes span hosts."""
        width = self.memory.role.width
        missing = self.missing(home, target, shift)
        rate, delay = self._link(home, shift, far)
        sent = max(missing.most, missing.total / home.num_ranks) * width / rate
        return sent + 2 * delay + self.checking(home, target, generates=generates)

    def checking(self, home: Layout, target: Layout, *, generates: bool) -> float:
        """Fingerprints on both sides; and where completions are drawn, packed weights and a probe of log-probs."""
        role = self.memory.role
        held = self.memory.sizes.held(target, _first()).total * role.width
        if self.hardware.profile is None:
            return CHECK_PASSES * held / (self.hardware.memory_rate * self.hardware.memory_share)
        rates, among = rates_of(self.hardware, role.dtype, role.width), max(home.num_ranks, target.num_ranks)
        trained = sum(self.memory.sizes.held(layout, _last(layout)).trained for layout in (home, target))
        seconds = rates.over("check", trained * role.width) * rates.slow("update", among)
        said = MESSAGES + 2 * generates
        seconds += said * self.hardware.gather_seconds(SMALL_MESSAGE, among, among)
        if generates:
            costs = Costs(role, self.hardware, self.memory)
            seconds += costs.packing(target) + costs.probe(home, target)
        return seconds

    def mixing_seconds(self, source: Layout, target: Layout, shift: int | None, *, far: bool) -> float:
        """Of mixing all weights into another role's fp32 averages: those that are elsewhere are sent in fp32."""
        missing = self.missing(source, target, shift, everything=True)
        rate, delay = self._link(source, shift, far)
        sent = max(missing.most, missing.total / source.num_ranks) * FP32 / rate
        held = self.memory.sizes.held(target, _first()).total
        return sent + 4 * FP32 * held / (self.hardware.memory_rate * self.hardware.memory_share) + 2 * delay

    def _link(self, home: Layout, shift: int | None, far: bool) -> tuple[float, float]:
        """Senders on the receiver's host are chosen where there are any: whole replicas stand within hosts."""
        near = shift is not None and home.pipeline == 1 and home.tensor <= self.hardware.per_host
        span = 1 if near or not far else self.hardware.per_host + 1
        return self.hardware.rate_between(span)


def _cut(layout: Layout, where: Coordinates | None) -> tuple[int, ...] | None:
    """All that what a rank holds depends on: replicas hold the same."""
    if where is None:
        return None
    data = (layout.data, where.data) if layout.sharded else ()
    return (layout.tensor, where.tensor, layout.pipeline, where.pipeline, *data)


def _absent(
    sizes: Sizes,
    pattern: Pattern,
    home: tuple[Layout, Coordinates | None],
    target: tuple[Layout, Coordinates],
    everything: bool,
) -> int:
    """Numbers of a pattern's parameters that a rank wants and its device does not hold."""
    box = held_box(pattern.shard, *target)
    wanted, held = sizes.copies(pattern, *target), 0
    there = wanted[1] + wanted[0] * everything
    if not there:
        return 0
    size = num_elements(box)
    layout, where = home
    shared = 0
    if where is not None:
        held = sizes.copies_in_both(pattern, (layout, where), target, everything=everything)
        other = held_box(pattern.shard, layout, where)
        shared = num_elements(
            tuple((max(a, c), max(a, c, min(b, d))) for (a, b), (c, d) in zip(box, other, strict=True))
        )
    return pattern.count * (there * size - held * shared)


def _first() -> Coordinates:
    return Coordinates(data=0, tensor=0, pipeline=0)


def _last(layout: Layout) -> Coordinates:
    """In the last stage, where the most is trained if lower layers are frozen."""
    return Coordinates(data=0, tensor=0, pipeline=layout.pipeline - 1)
