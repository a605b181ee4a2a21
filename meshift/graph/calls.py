"""The graph of one algorithm's step: model calls, host calls, weight syncs and loops, and the edges between them.

It knows nothing of torch, of models or of devices: what a call computes is an opaque task object that the
role it names understands. Edges follow from the keys that calls read and write, and from the weights they use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["generate", "infer", "train"]


class GraphError(ValueError):
    """The calls do not form a step: a key nobody writes, a key written twice, or two calls of one name."""


@dataclass(frozen=True, kw_only=True)
class ModelCall:
    """One use of one role in a step. `task` says what to compute (a sampling, a reading or a loss)."""

    name: str
    role: str
    kind: Kind
    task: Any
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()

    @property
    def weights_read(self) -> frozenset[str]:
        """Roles whose weights the call reads."""
        return frozenset((self.role,))

    @property
    def weights_written(self) -> frozenset[str]:
        """Roles whose weights the call changes."""
        return frozenset((self.role,)) if self.kind == "train" else frozenset()


@dataclass(frozen=True, kw_only=True)
class HostCall:
    """A step of plain Python in the same graph: GAE, a rule-based reward, a group baseline."""

    name: str
    function: Callable[[Any], Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    weights_read: frozenset[str] = frozenset()
    weights_written: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class SyncCall:
    """`target <- rate * source + (1 - rate) * target`, for every parameter, every `every` steps."""

    name: str
    source: str
    target: str
    rate: float
    every: int = 1
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    @property
    def weights_read(self) -> frozenset[str]:
        """Roles whose weights the call reads."""
        return frozenset((self.source, self.target))

    @property
    def weights_written(self) -> frozenset[str]:
        """Roles whose weights the call changes."""
        return frozenset((self.target,))


@dataclass(frozen=True, kw_only=True)
class LoopCall:
    """A graph within the step, run on each batch that `feed` gives until it gives None.

    `feed(batch, outcomes)` and `collect(batch, outcomes)` are told what the call reads and the outcomes so far;
    `collect` makes the call's own outcome of them. With `replaces_batch` that outcome's rows take the place of the
    step's batch, with all its inputs: such a call must be the first.
    """

    name: str
    graph: Graph
    feed: Callable[[Any, Sequence[Any]], Any]
    collect: Callable[[Any, Sequence[Any]], Any]
    reads: tuple[str, ...]
    writes: tuple[str, ...] = ()
    replaces_batch: bool = False

    @property
    def weights_read(self) -> frozenset[str]:
        """Roles whose weights the inner calls read."""
        return frozenset(role for call in self.graph.calls for role in call.weights_read)

    @property
    def weights_written(self) -> frozenset[str]:
        """Roles whose weights the inner calls change."""
        return frozenset(role for call in self.graph.calls for role in call.weights_written)


Call = ModelCall | HostCall | SyncCall | LoopCall


@dataclass(frozen=True)
class Graph:
    """The calls of a step in program order. `edges` maps each call to the calls it must wait for.

    `inputs` are the keys that the batch has before the step. Raises `GraphError` where the calls do not fit.
    """

    calls: tuple[Call, ...]
    inputs: frozenset[str]
    edges: Mapping[str, frozenset[str]] = field(init=False)

    def __post_init__(self) -> None:
        names = [call.name for call in self.calls]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise GraphError(f"two calls have the name {repeated[0]!r}; give each its own")
        edges = {name: frozenset(waits) for name, waits in _derive_edges(self.calls, self.inputs).items()}
        object.__setattr__(self, "edges", edges)

    def order(self) -> tuple[Call, ...]:
        """The calls one after another. Program order is one, since an edge always points backwards in it."""
        return self.calls

    def ready(self, done: Iterable[str]) -> tuple[Call, ...]:
        """Calls that are not done and wait for none: what a controller may start now, at the same time."""
        finished = frozenset(done)
        return tuple(c for c in self.calls if c.name not in finished and self.edges[c.name] <= finished)

    def roles(self) -> tuple[str, ...]:
        """Every role that a call uses, in order of first use."""
        seen: dict[str, None] = {}
        for call in self.calls:
            for role in sorted(call.weights_read | call.weights_written):
                seen.setdefault(role)
        return tuple(seen)


def _derive_edges(calls: tuple[Call, ...], inputs: frozenset[str]) -> dict[str, set[str]]:
    writers: dict[str, str] = {}
    edges: dict[str, set[str]] = {}
    for position, call in enumerate(calls):
        waits = edges.setdefault(call.name, set())
        if isinstance(call, LoopCall) and call.replaces_batch:
            if position > 0:
                raise GraphError(f"call {call.name!r} replaces the step's batch, so it must be the first call")
            writers.update(dict.fromkeys(inputs - set(call.writes), call.name))
        for key in call.reads:
            if key not in writers and key not in inputs:
                raise GraphError(f"call {call.name!r} reads {key!r}, which no earlier call writes")
            if key in writers and writers[key] != call.name:
                waits.add(writers[key])
        for key in call.writes:
            if key in writers or key in inputs:
                raise GraphError(
                    f"call {call.name!r} writes {key!r}, which {writers.get(key, 'the input')!r} gives"
                )
            writers[key] = call.name
        waits.update(earlier.name for earlier in calls[:position] if _share_changed_weights(earlier, call))
    return edges


def _share_changed_weights(earlier: Call, later: Call) -> bool:
    """Whether swapping the two calls would show one of them other weights."""
    read_after_write = earlier.weights_written & later.weights_read
    write_after_read = earlier.weights_read & later.weights_written
    return bool(read_after_write | write_after_read | (earlier.weights_written & later.weights_written))
