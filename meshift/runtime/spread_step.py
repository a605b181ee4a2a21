"""One step of a graph over several processes: each runs the calls that it takes part in.

Every process goes through the calls in the graph's order, leaves out those of others, and waits only for what it
reads, so calls on disjoint meshes run at the same time. Outcomes go from the first process of a call straight to
those that read them, and to process 0, which runs host calls and has the whole batch in the end: the one that
`step.run_step` gives. It knows nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from meshift.batch import Batch, Outcome
from meshift.errors import ConfigError
from meshift.graph.calls import Call, Graph, HostCall, ModelCall, SyncCall
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.streaming import Streams
from meshift.runtime.world import World
from meshift.step import run_call

HOST = 0
"""The process that runs host calls and ends with the whole batch."""


class SpreadStep:
    """A graph's steps in this process. Raises `ConfigError` for calls that cannot be spread yet."""

    def __init__(
        self, graph: Graph, roles: Mapping[str, SpreadRole], world: World, part_size: int | None = None
    ) -> None:
        """With `part_size`, calls on other devices read completions as they end (`streaming.py`)."""
        self.graph, self.roles, self.world = graph, roles, world
        for call in graph.order():
            if isinstance(call, SyncCall):
                roles[call.target].prepare_mix(roles[call.source])
        self._members = {call.name: self._members_of(call) for call in graph.order()}
        self._tags = {call.name: tag for tag, call in enumerate(graph.order(), start=1)}
        self._writers = {key: call.name for call in graph.order() for key in call.writes}
        self._streams = Streams(graph, self._members, world, part_size)

    @property
    def placements(self) -> Mapping[str, tuple[int, ...]]:
        """The processes of each call."""
        return self._members

    def run(self, batch: Batch, step: int, on_call: Callable[[str], None] = lambda name: None) -> Outcome:
        """This process's part of a step on a batch that all have. In process 0, the whole outcome."""
        began = time.perf_counter()
        metrics: dict[str, float] = {}
        lacking = {call.name for call in self.graph.order()}
        for call in self.graph.order():
            if self.world.rank in self._members[call.name]:
                if not self._streams.reads(call.name):
                    batch, found = self._fetch(batch, call.reads, lacking)
                    metrics.update(found)
                on_call(call.name)
                outcome = self._run(call, batch, step, began)
                lacking.discard(call.name)
                batch, metrics = batch.union(outcome.batch), {**metrics, **outcome.metrics}
                self._pass_on(call, outcome)
            if isinstance(call, ModelCall) and call.kind == "train":
                metrics.update(self.roles[call.role].publish())
        if self.world.rank == HOST:
            for call in self.graph.order():
                if call.name in lacking:
                    batch, found = self._receive(batch, call.name)
                    metrics.update(found)
        self.world.finish()
        return Outcome(batch=batch, metrics=metrics)

    def _run(self, call: Call, batch: Batch, step: int, began: float) -> Outcome:
        """The call, with `timing_s/<call>` and how far into the step it began, `start_s/<call>`."""
        started = time.perf_counter()
        if isinstance(call, ModelCall) and self._streams.reads(call.name):
            return self._streams.infer(call, self.roles[call.role], len(batch), began)
        if isinstance(call, ModelCall) and self._streams.feeds(call.name):
            outcome = self._streams.generate(call, self.roles[call.role], batch)
        else:
            outcome = run_call(call, self.roles, batch, step)
        times = {f"start_s/{call.name}": started - began, f"timing_s/{call.name}": time.perf_counter() - started}
        return Outcome(batch=outcome.batch, metrics={**outcome.metrics, **times})

    def _fetch(self, batch: Batch, keys: tuple[str, ...], lacking: set[str]) -> tuple[Batch, dict[str, float]]:
        """The batch with what the keys' writers wrote elsewhere, and their metrics."""
        metrics: dict[str, float] = {}
        for name in dict.fromkeys(self._writers[key] for key in keys if key in self._writers):
            if name in lacking:
                batch, found = self._receive(batch, name)
                metrics.update(found)
                lacking.discard(name)
        return batch, metrics

    def _receive(self, batch: Batch, name: str) -> tuple[Batch, dict[str, float]]:
        outcome = self.world.receive(self._members[name][0], self._tags[name])
        return batch.union(outcome.batch), dict(outcome.metrics)

    def _pass_on(self, call: Call, outcome: Outcome) -> None:
        """Send an outcome to those that will read it, from the first of those that have it."""
        members = self._members[call.name]
        if self.world.rank != members[0]:
            return
        readers = {HOST}
        for later in self.graph.order():
            if set(later.reads) & set(call.writes) and not self._streams.reads(later.name):
                readers.update(self._members[later.name])
        self.world.send(outcome, sorted(readers - set(members)), self._tags[call.name])

    def _members_of(self, call: Call) -> tuple[int, ...]:
        match call:
            case ModelCall():
                return self.roles[call.role].members(call.kind)
            case SyncCall():
                return self.world.members(self.roles[call.source].home, self.roles[call.target].home)
            case HostCall():
                return (HOST,)
        raise ConfigError(f"the call {call.name} cannot run over several processes yet; run without a plan")
