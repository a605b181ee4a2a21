"""What a planner chooses among: for each use of a role the layouts that can be best, by size of mesh.

A use is a role with a kind of call, since all its calls of a kind run in one place (`config.plan`). A layout is
left out only where another of as many devices is at least as fast, whatever its parameters' moves cost, and takes
no more memory. It knows nothing of where meshes lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from math import ceil

from meshift.layout.layout import Coordinates, Layout
from meshift.planner.cost import Costs
from meshift.planner.hardware import Hardware
from meshift.planner.memory import SLOT_STEP, Memory
from meshift.planner.moving import Moving
from meshift.planner.uses import Candidate, Op, Use
from meshift.planner.workload import Mixing, PlannedCall, Step

GRAIN = 0.01
"""Of a device's memory: finer differences do not decide between layouts."""
SPARED, LEAST_SPARED = 0.2, 0.05
"""Of a device's memory: fewer slots that spare less are no candidate; and the two most and the fewest of them."""
FREE_DEVICES = 8
"""Of one host, up to which a mesh may begin at any device."""
FEW_HOSTS, FREE_HOSTS = 8, 16
"""Up to which any number of hosts is a mesh, and up to which one begins at any host."""
MAX_STAGES = 32
"""More stages than this do not pay for themselves, and make for many layouts."""


class Problem:
    """A step, on so many devices of one kind. Ops are in program order, as every process makes them."""

    def __init__(
        self, step: Step, hardware: Hardware, num_devices: int, *, streaming: bool = True, sharding: bool = True
    ) -> None:
        """`streaming`: readings elsewhere may begin before generation ends. `sharding`: `s` may be chosen."""
        hardware = hardware.shared_by(num_devices)
        step = step.with_offloaded(()) if hardware.machine.packs else step
        self.step, self.hardware, self.num_devices = step, hardware, num_devices
        self.streaming, self.sharding = streaming, sharding
        self.memories = {name: Memory(role, hardware.machine) for name, role in step.roles.items()}
        self.costs = {name: Costs(step.roles[name], hardware, memory) for name, memory in self.memories.items()}
        self.moving = {name: Moving(memory, hardware) for name, memory in self.memories.items()}
        self._layouts: dict[Use, frozenset[Layout]] = {}
        self.uses = tuple(dict.fromkeys(Use(call.role, call.kind) for call in step.calls))
        self.ops = tuple(_ops(step, self))

    @property
    def capacity(self) -> float:
        """Bytes of each device that roles and calls may take."""
        return self.hardware.usable

    def home(self, role: str) -> Use:
        """Where a role's weights live: where it is trained, else where its first call is."""
        uses = [use for use in self.uses if use.role == role]
        return next((use for use in uses if use.kind == "train"), uses[0])

    def calls(self, use: Use) -> list[PlannedCall]:
        """The calls of a use."""
        return [call for call in self.step.calls if Use(call.role, call.kind) == use]

    @cached_property
    def candidates(self) -> Mapping[Use, tuple[Candidate, ...]]:
        """Of every use, the smallest first; those that are dominated are left out."""
        every = {use: [one for one in self.all_candidates(use) if self._is_shared(use, one)] for use in self.uses}
        fitting = {use: self._fitting(use, found) for use, found in every.items()}
        found: dict[Use, tuple[Candidate, ...]] = {}
        for use in sorted(self.uses, key=lambda use: use != self.home(use.role)):
            found[use] = tuple(self._undominated(use, fitting, found))
        return {use: found[use] for use in self.uses}

    def _is_shared(self, use: Use, one: Candidate) -> bool:
        """Whether all uses of its role can run in this layout, where they must."""
        others = [other for other in self.uses if other.role == use.role and self.is_bound(use.role)]
        return all(one.layout in self._layouts_of(other) for other in others)

    def _layouts_of(self, use: Use) -> frozenset[Layout]:
        if use not in self._layouts:
            self._layouts[use] = frozenset(self.layouts(use))
        return self._layouts[use]

    def sizes(self) -> list[int]:
        """Sizes of meshes: within a host all (on one host), else those that divide it; and whole hosts.

        Of few hosts any number, of many powers of two, three times those, and all.
        """
        per_host, num_devices = self.hardware.per_host, self.num_devices
        if num_devices <= per_host:
            return list(range(1, num_devices + 1))
        hosts = num_devices // per_host
        wholes = {k for i in range(hosts.bit_length()) for k in (1 << i, 3 << i) if k <= hosts} | {hosts}
        if hosts <= FEW_HOSTS:
            wholes = set(range(1, hosts + 1))
        return [n for n in range(1, per_host) if per_host % n == 0] + [per_host * k for k in sorted(wholes)]

    def offsets(self, size: int) -> range:
        """First devices that meshes of a size may have."""
        return range(0, self.num_devices - size + 1, self.stride(size))

    def stride(self, size: int) -> int:
        """What first devices are multiples of: of few devices of one host any, of few hosts any host's first.

        Else the size itself (aligned meshes), so that there are fewer of them.
        """
        per_host = self.hardware.per_host
        if self.num_devices <= min(per_host, FREE_DEVICES):
            return 1
        if size >= per_host and self.num_devices <= FREE_HOSTS * per_host:
            return per_host
        return size

    @property
    def is_aligned(self) -> bool:
        """Whether there are meshes that are no candidates because of where they begin, or of their size."""
        return self.num_devices > min(self.hardware.per_host, FREE_DEVICES)

    def is_bound(self, role: str) -> bool:
        """Whether all calls of the role have one placement: a trained one that is offloaded (`spread_role`)."""
        return self.step.roles[role].offloaded and self.step.roles[role].trained

    def layouts(self, use: Use) -> Iterator[Layout]:
        """Every layout that could carry the use's calls; tensor ranks stand on one host."""
        config = self.step.roles[use.role].config
        rows = min(call.texts.num_sequences // call.num_updates for call in self.calls(use))
        for size in self.sizes():
            for tensor in _divisors(size):
                if tensor > min(self.hardware.per_host, config.num_heads):
                    continue
                if size > self.hardware.per_host and self.hardware.per_host % tensor:
                    continue  # some groups would cross hosts
                for pipeline in _divisors(size // tensor):
                    data = size // tensor // pipeline
                    if pipeline > min(config.num_layers, MAX_STAGES) or data > rows:
                        continue
                    yield Layout(data=data, tensor=tensor, pipeline=pipeline)
                    if data > 1 and self._may_shard(use):
                        yield Layout(data=data, tensor=tensor, pipeline=pipeline, sharded=True)

    def _may_shard(self, use: Use) -> bool:
        """Whether data ranks may each keep some rows.

        Not where weights are drawn with, nor of adapters whose sums with their matrices another role follows: a
        run by plan needs both whole there, and refuses such a config.
        """
        followed = any(mixing.source == use.role for mixing in self.step.mixings)
        adapted = self.step.roles[use.role].config.adapter is not None
        sums = followed and adapted and use == self.home(use.role)
        return self.sharding and use.kind != "generate" and not sums

    def fewer_slots(self, use: Use, layout: Layout) -> Iterator[int]:
        """Slots of a generation below what it has by the config, the most first.

        Seven eighths, three quarters, a half, three eighths, ... in whole steps of a session's memory.
        """
        if use.kind != "generate":
            return
        own = max(ceil(call.texts.num_sequences / layout.data) for call in self.calls(use))
        sessions = min(layout.pipeline, own)
        before = each = min(self.calls(use)[0].num_slots // sessions, ceil(own / sessions))
        for halvings in range(each.bit_length()):
            for eighths in (6, 4) if halvings else (7, 6, 4):
                found = eighths * each // (8 << halvings) // SLOT_STEP * SLOT_STEP
                if 0 < found < before:
                    yield sessions * found
                    before = found

    def slot_choices(self, use: Use, layout: Layout) -> Iterator[int | None]:
        """The config's (None), and fewer where that spares memory worth speaking of."""
        yield None
        every = list(self.fewer_slots(use, layout))
        before = last = self._working(use, layout, None) if every else 0
        for slots in every:
            needed = self._working(use, layout, slots)
            if before - needed >= SPARED * self.capacity:
                before = needed
            elif slots not in (*every[:2], every[-1]) or last - needed < LEAST_SPARED * self.capacity:
                continue
            yield slots
            last = needed

    def all_candidates(self, use: Use) -> Iterator[Candidate]:
        """Every layout with all its slots, whether or not it fits, and whatever is better."""
        for layout in self.layouts(use):
            for slots in self.slot_choices(use, layout):
                yield self.candidate(use, layout, slots)

    def _telling_ranks(self, role: str, layout: Layout) -> list[Coordinates]:
        """Ranks among which those that need the most are: at the ends, and the first of the stages that are alike.

        Stages are alike that have as many layers, and as many of them trained; micro-batches in flight only fall.
        """
        given = self.step.roles[role]
        first: dict[tuple[int, int], int] = {}
        stages = layout.stage_layers(given.config.num_layers)
        for number, layers in enumerate(stages[1:-1], 1):
            trained = sum(layer >= given.num_frozen_layers for layer in layers)
            first.setdefault((len(layers), trained), number)
        return [
            Coordinates(data=0, tensor=tensor, pipeline=stage)
            for stage in sorted({0, *first.values(), layout.pipeline - 1})
            for tensor in {0, layout.tensor - 1}
        ]

    def _working(self, use: Use, layout: Layout, slots: int | None) -> int:
        memory, ranks = self.memories[use.role], self._telling_ranks(use.role, layout)
        calls = with_slots(self.calls(use), slots)
        return max(memory.working(call, layout, rank).total for call in calls for rank in ranks)

    def candidate(self, use: Use, layout: Layout, slots: int | None = None) -> Candidate:
        """A layout with its seconds and bytes, whether or not it fits; `slots` None: the config's."""
        memory, ranks = self.memories[use.role], self._telling_ranks(use.role, layout)
        calls, grain = with_slots(self.calls(use), slots), GRAIN * self.capacity
        return Candidate(
            layout=layout,
            costs={call.name: self.costs[use.role].of(call, layout) for call in calls},
            kept=_round_up((memory.kept(layout, rank).total for rank in ranks), grain),
            copy=_round_up((memory.kept(layout, rank).weights for rank in ranks), grain),
            working={
                call.name: _round_up((memory.working(call, layout, rank).total for rank in ranks), grain)
                for call in calls
            },
            leaving=memory.kept(layout, layout.coordinates(0)).leaving,
            slots=slots,
        )

    def _fitting(self, use: Use, found: Sequence[Candidate]) -> list[Candidate]:
        """Those that fit alone; if none does, those of the most devices that lack the least."""
        is_home = use == self.home(use.role)

        def needed(one: Candidate) -> float:
            return (one.kept if is_home else one.copy) + max(one.working.values())

        fitting = [one for one in found if needed(one) <= self.capacity]
        return fitting or [min(found, key=needed)]

    def _undominated(
        self, use: Use, fitting: Mapping[Use, Sequence[Candidate]], found: Mapping[Use, Sequence[Candidate]]
    ) -> Iterator[Candidate]:
        """`found` has what is left of the homes, if this is none. Of a role with one placement all are left."""
        if self.is_bound(use.role):
            yield from sorted(fitting[use], key=lambda one: one.size)
            return
        by_size: dict[int, list[Candidate]] = {}
        moving, leaving = dict[Layout, float](), dict[tuple[Op, Layout | int], float]()
        home = self.home(use.role)
        at_home = {one.layout for one in found.get(home, ())} if use != home else set()
        alone = sum(other.role == use.role for other in self.uses) == 1
        for one in sorted(fitting[use], key=lambda one: sum(one.seconds.values())):
            others = by_size.setdefault(one.size, [])
            # Where a role's uses are one placement, weights are there once: that is given up with the layout.
            lost = 0 if alone or use != home else one.copy
            if one.layout in at_home or not any(self._dominates(other, one, lost, moving) for other in others):
                others.append(one)
                moving[one.layout] = self._most_moving(use, one, fitting, leaving)
        for size in sorted(by_size):
            yield from by_size[size]

    def _dominates(self, one: Candidate, other: Candidate, lost: int, moving: Mapping[Layout, float]) -> bool:
        """Whether no plan is worse with `one` instead, even if moves cost it their most and the other nothing."""
        if one.kept + lost > other.kept or one.copy > other.copy:
            return False
        if any(one.working[name] > other.working[name] for name in one.working):
            return False
        if any(one.costs[name].late > other.costs[name].late for name in one.costs):
            return False
        if self.hardware.cores and any(one.work(name) > other.work(name) for name in one.costs):
            return False  # it would be in others' way for longer
        gains = [other.seconds[name] - one.seconds[name] for name in one.seconds]
        return min(gains) >= 0 and max(gains) >= moving[one.layout]

    def _most_moving(
        self,
        use: Use,
        one: Candidate,
        fitting: Mapping[Use, Sequence[Candidate]],
        leaving: dict[tuple[Op, Layout | int], float],
    ) -> float:
        """The most that all moves and mixings of this candidate together can take.

        `leaving` keeps what those from it to any other take, for candidates of the use for which that is the same.
        """
        total = 0.0
        for op in self.ops:
            if op.kind == "call" or use not in op.uses:
                continue
            others = {other.layout for other in fitting[next(u for u in op.uses if u != use)]}
            if op.uses[0] == use:
                alike = op, self._tells(one.layout)
                if alike not in leaving:
                    leaving[alike] = max(self.moving_seconds(op, one.layout, other, None) for other in others)
                total += leaving[alike]
            else:
                sources = {self._tells(other): other for other in others}.values()
                total += max(self.moving_seconds(op, other, one.layout, None) for other in sources)
        return total

    def _tells(self, source: Layout) -> Layout | int:
        """What `moving_seconds` depends on of a source that is elsewhere: of an unmeasured one the ranks alone."""
        return source.num_ranks if self.hardware.profile is None else source

    def moving_seconds(self, op: Op, source: Layout, target: Layout, shift: int | None) -> float:
        """Of a move or a mixing; `shift` as in `Moving`, which only says here whether one mesh is in the other."""
        far = max(source.num_ranks, target.num_ranks) > self.hardware.per_host
        if shift is None:
            far = self.num_devices > self.hardware.per_host
        elif source == target and op.kind == "move":
            return 0.0
        moving = self.moving[op.uses[0].role]
        if op.kind == "move":
            return moving.seconds(source, target, shift, far=far, generates=op.uses[1].kind == "generate")
        return moving.mixing_seconds(source, target, shift, far=far) / self._every(op)

    def buffers(self, op: Op, source: Layout, target: Layout) -> int:
        """Bytes that wait to be sent or stored on a device during a move or a mixing."""
        return self.memories[op.uses[0].role].buffers(source, target, mixing=op.kind == "mixing")

    def _every(self, op: Op) -> int:
        return next(m.every for m in self.step.mixings if m.target == op.uses[1].role)


def with_slots(calls: Iterable[PlannedCall], slots: int | None) -> list[PlannedCall]:
    """Calls whose generations decode so many sequences at a time; None: as they are."""
    if slots is None:
        return list(calls)
    return [replace(call, num_slots=slots) if call.kind == "generate" else call for call in calls]


def _ops(step: Step, problem: Problem) -> list[Op]:
    """Calls, each training call (drawing ahead, all) followed by its role's moves; mixings at last."""
    ops: list[Op] = []
    moves: list[Op] = []
    place: dict[str, int] = {}
    for call in step.calls:
        use = Use(call.role, call.kind)
        waits = tuple(sorted(place[name] for name in call.waits))
        generations = tuple(i for i in waits if call.kind == "infer" and ops[i].uses[0].kind == "generate")
        streams = generations if problem.streaming else ()
        place[call.name] = len(ops)
        ops.append(Op(name=call.name, kind="call", uses=(use,), waits=waits, streams=streams))
        if call.kind == "train":
            (moves if step.draws_ahead else ops).extend(
                Op(name=f"{call.role} to {other.kind}", kind="move", uses=(use, other), waits=(place[call.name],))
                for other in problem.uses
                if other.role == call.role and other != use
            )
    ops += moves
    return [*ops, *(_mixing(mixing, ops, problem) for mixing in step.mixings)]


def _mixing(mixing: Mixing, ops: Sequence[Op], problem: Problem) -> Op:
    uses = problem.home(mixing.source), problem.home(mixing.target)
    waits = tuple(i for i, op in enumerate(ops) if op.kind == "call" and op.uses[0] in uses)
    return Op(name=f"{mixing.source} into {mixing.target}", kind="mixing", uses=uses, waits=waits)


def _round_up(numbers: Iterable[int], grain: float) -> int:
    return int(ceil(max(numbers) / grain) * grain)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
