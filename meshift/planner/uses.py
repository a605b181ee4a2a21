"""What a planner places: uses of roles, the layouts that each may have, and what takes devices for a time.

It knows nothing of a cluster, nor of what is best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from meshift.graph.calls import Kind
from meshift.layout.layout import Layout
from meshift.planner.cost import Cost


@dataclass(frozen=True, order=True)
class Use:
    """A role and a kind of call."""

    role: str
    kind: Kind

    def __str__(self) -> str:
        return f"{self.role}.{self.kind}"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout for a use: what its calls cost, and bytes of the rank that needs the most of each.

    `kept` is what a rank keeps where the role lives in this layout, `copy` where it lives in another; `working`
    what each call needs on top. All are rounded up, to hundredths of what a device has. `leaving` is
    copied where a role that lives here leaves the device. `slots` are the sequences that a generation decodes at a
    time, where they are fewer than the config's.
    """

    layout: Layout
    costs: Mapping[str, Cost]
    kept: int
    copy: int
    working: Mapping[str, int]
    leaving: int = 0
    slots: int | None = None

    @property
    def size(self) -> int:
        """Devices."""
        return self.layout.num_ranks

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        """Of each call."""
        return {name: cost.seconds for name, cost in self.costs.items()}

    def least(self, name: str) -> float:
        """Seconds of a call without packing weights, which is counted with their move where there is one."""
        return self.seconds[name] - self.costs[name].parts.get("pack", 0.0)

    def work(self, name: str) -> float:
        """Processor-seconds of a call."""
        return self.costs[name].seconds * self.costs[name].busy


@dataclass(frozen=True, kw_only=True)
class Op:
    """Something that takes devices for a time: a call, a move of new weights to another use, or a mixing.

    `uses` are one use for a call, else where weights come from and where they go. `waits` are earlier ops.
    """

    name: str
    kind: str
    uses: tuple[Use, ...]
    waits: tuple[int, ...]
    streams: tuple[int, ...] = ()
