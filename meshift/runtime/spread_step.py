"""One step of a graph over several processes: each runs the calls that it takes part in.

Every process goes through the calls in the graph's order, leaves out those of others, and waits only for what it
reads, so calls on disjoint meshes run at the same time. Outcomes go from the first process of a call straight to
those that read them, and to process 0, which runs host calls and has the whole batch in the end: the one that
`step.run_step` gives. A loop is a host call in whose rounds others help: process 0 says with what each begins. It
knows nothing of models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from meshift.batch import Batch, Outcome
from meshift.graph.calls import Call, Graph, LoopCall, ModelCall, SyncCall
from meshift.runtime.models import device_for_run
from meshift.runtime.peaks import PeakMeter
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.streaming import Streams
from meshift.runtime.world import World
from meshift.step import run_call

HOST = 0
"""The process that runs host calls and ends with the whole batch."""
ROUND = "round"
"""What process 0 numbers the rounds of a loop by, to those who help; without it there is none left."""
Hear = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Now:
    """The step that is run: its number, when it began by this process's clock, and who hears of calls."""

    step: int
    began: float
    on_call: Hear


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a process has after its own calls of a step; `lacking` are the calls whose outcomes it has not got."""

    batch: Batch
    metrics: Mapping[str, float]
    lacking: frozenset[str]


class SpreadStep:
    """A graph's steps in this process."""

    def __init__(
        self,
        graph: Graph,
        roles: Mapping[str, SpreadRole],
        world: World,
        part_size: int | None = None,
        first_tag: int = 1,
        *,
        onward: Sequence[Call] = (),
        publishes: bool = True,
    ) -> None:
        """With `part_size`, calls on other devices read completions as they end (`streaming.py`).

        Its messages have tags from `first_tag` up to, and without, `end_tag`. Processes of `onward`, calls of
        another graph that go on with this one's batch, get what these read. Unless it `publishes`, somebody else
        does, when a step's new weights may move to where else they are used.
        """
        self.graph, self.roles, self.world = graph, roles, world
        self._onward, self._publishes = tuple(onward), publishes
        calls = graph.order()
        for call in calls:
            if isinstance(call, SyncCall):
                roles[call.target].prepare_mix(roles[call.source])
        self._members = {call.name: self._members_of(call) for call in calls}
        self._meter = PeakMeter(device_for_run())
        self._peaks: dict[str, float] = {}
        self._tags = {call.name: tag for tag, call in enumerate(calls, start=first_tag)}
        self._writers = {key: call.name for call in calls for key in _given(call, graph)}
        self._streams = Streams(graph, self._members, world, part_size, first_tag + len(calls))
        self._loops: dict[str, SpreadLoop] = {}
        self.end_tag = self._streams.end_tag
        for call in calls:
            if isinstance(call, LoopCall):
                rounds = SpreadStep(call.graph, roles, world, part_size, self.end_tag + 1)
                self._loops[call.name] = SpreadLoop(call, rounds, self.end_tag)
                self.end_tag = rounds.end_tag
        self._receivers = {call.name: self._receivers_of(call) for call in calls}
        self._peaks_tag, self.end_tag = self.end_tag, self.end_tag + 1

    @property
    def placements(self) -> Mapping[str, tuple[int, ...]]:
        """The processes of each call; of those within a loop too, where the step has no other of that name."""
        within = [loop.rounds.placements for loop in self._loops.values()]
        loops = {name: tuple(sorted({HOST, *loop.members})) for name, loop in self._loops.items()}
        inner = {name: members for placements in within for name, members in placements.items()}
        return inner | self._members | loops

    @property
    def members(self) -> frozenset[int]:
        """The processes that have a part in any call; all, where weights move."""
        if any(call.weights_written for call in self.graph.order()):
            return frozenset(self.world.ranks.values())
        own = {rank for members in self._members.values() for rank in members}
        return frozenset(own.union(*(loop.members for loop in self._loops.values())))

    def run(self, batch: Batch, step: int, on_call: Hear = lambda name: None) -> Outcome:
        """This process's part of a step on a batch that all have. In process 0, the whole outcome."""
        outcome = self.run_calls(batch, Now(step=step, began=time.perf_counter(), on_call=on_call))
        outcome = replace(outcome, metrics={**outcome.metrics, **self.peaks_of_all({})})
        self.world.finish()
        return outcome

    def run_calls(self, batch: Batch, now: Now) -> Outcome:
        """As `run`, but what was sent may still be on its way."""
        return self.gather(self.run_own(batch, now))

    def run_own(self, batch: Batch, now: Now) -> Part:
        """This process's calls."""
        metrics: dict[str, float] = {}
        lacking = {call.name for call in self.graph.order()}
        for call in self.graph.order():
            if self.world.rank in self._members[call.name]:
                if not self._streams.reads(call.name):
                    batch, found = self._fetch(batch, call, lacking)
                    metrics.update(found)
                now.on_call(call.name)
                outcome = self._metered(call, batch, now)
                lacking.discard(call.name)
                batch, metrics = self._joined(call.name, batch, outcome), {**metrics, **outcome.metrics}
                self._pass_on(call, outcome)
            elif call.name in self._loops:
                self._loops[call.name].help(now)
            if self._publishes and isinstance(call, ModelCall) and call.kind == "train":
                metrics.update(self.roles[call.role].publish())
            if isinstance(call, SyncCall) and (now.step + 1) % call.every == 0:
                self.roles[call.target].is_mixed = True  # also where it was not: process 0 keeps account of it
        return Part(batch=batch, metrics=metrics, lacking=frozenset(lacking))

    def gather(self, part: Part) -> Outcome:
        """What was sent to this process and that no call of its own has waited for."""
        batch, metrics = part.batch, dict(part.metrics)
        for call in self.graph.order():
            if call.name in part.lacking and self.world.rank in self._receivers[call.name]:
                batch, found = self._receive(batch, call.name)
                metrics.update(found)
        if self.world.rank == HOST:
            metrics.update(self._utilisation(metrics))
        return Outcome(batch=batch, metrics=metrics)

    def publish(self) -> dict[str, float]:
        """Move the new weights of all that the step trains; every process calls this, after its calls."""
        metrics: dict[str, float] = {}
        for call in self.graph.order():
            if isinstance(call, ModelCall) and call.kind == "train":
                metrics.update(self.roles[call.role].publish())
        return metrics

    def _metered(self, call: Call, batch: Batch, now: Now) -> Outcome:
        """The call, with its peak of memory; the calls of a loop have theirs one by one."""
        if call.name in self._loops:
            return self._run(call, batch, now)
        self._meter.begin(call.name)
        outcome = self._run(call, batch, now)
        _raise_to(self._peaks, self._meter.end())
        return outcome

    def peaks_of_all(self, others: Mapping[str, float]) -> dict[str, float]:
        """In process 0, the most that any process had in memory in each call of the step; elsewhere this one's.

        `others` are this process's in calls of another graph; a step that trains asks all processes.
        """
        peaks = {**self.take_peaks(), **others}
        if self.world.rank != HOST:
            self.world.send(Outcome(metrics=peaks), (HOST,), self._peaks_tag)
            return peaks
        for member in sorted(self.members - {HOST}):
            _raise_to(peaks, self.world.receive(member, self._peaks_tag).metrics)
        return peaks

    def take_peaks(self) -> dict[str, float]:
        """What this process had in memory at most in each of its calls, those in loops too; forgotten here."""
        peaks, self._peaks = self._peaks, {}
        for loop in self._loops.values():
            _raise_to(peaks, loop.rounds.take_peaks())
        return peaks

    def _run(self, call: Call, batch: Batch, now: Now) -> Outcome:
        """The call, with `timing_s/<call>` and how far into the step it began, `start_s/<call>`."""
        started = time.perf_counter()
        if isinstance(call, ModelCall) and self._streams.reads(call.name):
            return self._streams.infer(call, self.roles[call.role], len(batch), now.began)
        if isinstance(call, ModelCall) and self._streams.feeds(call.name):
            outcome = self._streams.generate(call, self.roles[call.role], batch)
        elif call.name in self._loops:
            outcome = self._loops[call.name].lead(batch, now)
        else:
            outcome = run_call(call, self.roles, batch, now.step)
        times = {
            f"start_s/{call.name}": started - now.began,
            f"timing_s/{call.name}": time.perf_counter() - started,
        }
        return Outcome(batch=outcome.batch, metrics={**outcome.metrics, **times})

    def _utilisation(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """`perf/mfu`: of all trained roles together, weighed by how long they had how many devices."""
        calls = [call for call in self.graph.order() if isinstance(call, ModelCall) and call.kind == "train"]
        measured = [call for call in calls if f"perf/mfu/{call.role}" in metrics]
        times = [len(self._members[call.name]) * metrics[f"timing_s/{call.name}"] for call in measured]
        used = [metrics[f"perf/mfu/{call.role}"] * time for call, time in zip(measured, times, strict=True)]
        return {"perf/mfu": sum(used) / sum(times)} if sum(times) > 0 else {}

    def _fetch(self, batch: Batch, call: Call, lacking: set[str]) -> tuple[Batch, dict[str, float]]:
        """The batch with what those wrote elsewhere from whom the call reads, and their metrics."""
        metrics: dict[str, float] = {}
        for name in dict.fromkeys(self._writers[key] for key in call.reads if key in self._writers):
            if name in lacking and name != call.name:
                batch, found = self._receive(batch, name)
                metrics.update(found)
                lacking.discard(name)
        return batch, metrics

    def _receive(self, batch: Batch, name: str) -> tuple[Batch, dict[str, float]]:
        outcome = self.world.receive(self._members[name][0], self._tags[name])
        return self._joined(name, batch, outcome), dict(outcome.metrics)

    def _joined(self, name: str, batch: Batch, outcome: Outcome) -> Batch:
        """The batch after a call."""
        replaced = name in self._loops and self._loops[name].call.replaces_batch
        return outcome.batch if replaced else batch.union(outcome.batch)

    def _pass_on(self, call: Call, outcome: Outcome) -> None:
        """Send an outcome to those that will read it, from the first of those that have it."""
        if self.world.rank != self._members[call.name][0]:
            return
        if call.name in self._loops:  # whose batch has columns that only host calls read
            later = (*self.graph.order(), *self._onward)
            read = {key for one in later if isinstance(one, ModelCall) for key in one.reads}
            outcome = replace(outcome, batch=outcome.batch.select(read.intersection(_given(call, self.graph))))
        self.world.send(outcome, sorted(self._receivers[call.name]), self._tags[call.name])

    def _receivers_of(self, call: Call) -> frozenset[int]:
        """The processes that a call's outcome is sent to: process 0, and those that read of it."""
        readers, given = {HOST}, set(_given(call, self.graph))
        for later in self.graph.order():
            if given.intersection(later.reads) and not self._streams.reads(later.name):
                readers.update(self._members[later.name])
        for later in self._onward:
            if given.intersection(later.reads):
                readers.update(self._members_of(later))
        return frozenset(readers - set(self._members[call.name]))

    def _members_of(self, call: Call) -> tuple[int, ...]:
        """Those that have what the call reads, and its outcome."""
        match call:
            case ModelCall():
                return self.roles[call.role].members(call.kind)
            case SyncCall():
                return self.world.members(self.roles[call.source].home, self.roles[call.target].home)
        return (HOST,)


class SpreadLoop:
    """A `LoopCall`: process 0 feeds its rounds and collects them, and the members of its calls run them too."""

    def __init__(self, call: LoopCall, rounds: SpreadStep, tag: int) -> None:
        """`rounds` runs the graph within, and `tag` is of what process 0 says of each round."""
        self.call, self.rounds, self.members = call, rounds, rounds.members
        self._tag, self._world = tag, rounds.world
        calls = call.graph.order()
        read = {key for inner in calls if isinstance(inner, ModelCall) for key in inner.reads}
        self._told = tuple(sorted(read & call.graph.inputs))

    def lead(self, batch: Batch, now: Now) -> Outcome:
        """What process 0 does: a round for each batch that `feed` gives, then the call's own outcome."""
        given, outcomes = batch.select(self.call.reads), list[Outcome]()
        helpers = sorted(self.members - {HOST})
        while (fed := self.call.feed(given, outcomes)) is not None:
            told = Outcome(batch=fed.select(self._told), metrics={ROUND: len(outcomes)})
            self._world.send(told, helpers, self._tag)
            outcome = self.rounds.run_calls(fed, now)
            outcomes.append(_without_starts(outcome) if outcomes else outcome)
        self._world.send(Outcome(), helpers, self._tag)
        return self.call.collect(given, outcomes)

    def help(self, now: Now) -> None:
        """What the others do: their part of each round, until there is none."""
        if self._world.rank not in self.members:
            return
        while ROUND in (told := self._world.receive(HOST, self._tag)).metrics:
            self.rounds.run_calls(told.batch, now)


def _given(call: Call, graph: Graph) -> tuple[str, ...]:
    """The keys of a call's outcome: those that it writes, and if it replaces the batch, the step's inputs."""
    replaces = isinstance(call, LoopCall) and call.replaces_batch
    return (*call.writes, *sorted(graph.inputs - set(call.writes))) if replaces else call.writes


def _raise_to(peaks: dict[str, float], others: Mapping[str, float]) -> None:
    for key, peak in others.items():
        peaks[key] = max(peaks.get(key, 0.0), peak)


def _without_starts(outcome: Outcome) -> Outcome:
    """A later round's outcome: when a loop's calls began is when they did so first."""
    kept = {key: value for key, value in outcome.metrics.items() if not key.startswith("start_s/")}
    return replace(outcome, metrics=kept)
