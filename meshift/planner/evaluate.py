"""A plan played through: what each device does when, and what it must hold, from placements alone.

Independent of the searches: devices work off what is theirs in program order as discrete events, weights are
counted device by device, and moves take the bytes of real reallocation plans. It knows nothing of searches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from meshift.graph.calls import Kind
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.models.shards import shard_table
from meshift.planner.cost import WORK, Cost, Costs
from meshift.planner.hardware import Hardware
from meshift.planner.memory import FP32, Memory
from meshift.planner.moving import Moving
from meshift.planner.workload import PlannedCall, Role, Step
from meshift.realloc.dtypes import Dtypes
from meshift.realloc.plan import plan

Placements = Mapping[str, Mapping[Kind, Placement]]
MAX_PLANNED = 256
"""Ranks up to which moves are planned in full; beyond, sharded sources make for millions of transfers."""
FIRST_PART = 0.1
SMALL = 1e-12
"""Seconds that are none."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that devices did. `peak` is bytes on the device that needed the most, of calls."""

    name: str
    kind: str
    start: float
    end: float
    devices: frozenset[Device]
    cost: Cost | None = None
    peak: float = 0.0


@dataclass(kw_only=True)
class _Task:
    """An event to be: what it waits for, and whether it may begin to read of a generation that goes on.

    `busy` processes are at work, with what `Profile.crowding` names `work`.
    """

    name: str
    kind: str
    seconds: float
    devices: frozenset[Device]
    waits: set[str]
    cost: Cost | None = None
    streams: bool = False
    late: float = 1.0
    busy: float = 1.0
    work: str = "update"


def evaluate(step: Step, hardware: Hardware, placements: Placements, *, streaming: bool = True) -> list[Event]:
    """Every event of a step, in the order in which they begin."""
    step, hardware = _there(step, hardware, placements)
    events = _play(_tasks(step, hardware, placements, streaming), hardware)
    peaks = peak_bytes(step, hardware, placements)
    return [Event(**{**vars(event), "peak": peaks.get(event.name, 0.0)}) for event in events]


def replay(
    step: Step,
    hardware: Hardware,
    placements: Placements,
    drawn: Iterable[Mapping[str, Cost]],
    *,
    streaming: bool = True,
) -> Iterator[list[Event]]:
    """The events of a step, once for each of `drawn`: costs of some of its calls; moves are planned once."""
    play = player(step, hardware, placements, streaming=streaming)
    for costs in drawn:
        yield play(costs)


Player = Callable[[Mapping[str, Cost]], list[Event]]


def player(step: Step, hardware: Hardware, placements: Placements, *, streaming: bool = True) -> Player:
    """The step's events by costs of some of its calls; its moves are planned here, once."""
    step, hardware = _there(step, hardware, placements)
    tasks = _tasks(step, hardware, placements, streaming)

    def play(costs: Mapping[str, Cost]) -> list[Event]:
        return _play([_with_cost(task, costs.get(task.name)) for task in tasks], hardware)

    return play


def _there(step: Step, hardware: Hardware, placements: Placements) -> tuple[Step, Hardware]:
    """As it is for these processes; offloading without another memory is none."""
    return offloading_there(step, hardware), hardware_there(hardware, placements)


def hardware_there(hardware: Hardware, placements: Placements) -> Hardware:
    """As it is to each process of a plan, where they share a host's processors and memory."""
    return hardware.shared_by(len(_devices(placements)))


def offloading_there(step: Step, hardware: Hardware) -> Step:
    """The step, with no role offloaded where the device's memory is the host's."""
    return step.with_offloaded(()) if hardware.machine.packs else step


def _with_cost(task: _Task, cost: Cost | None) -> _Task:
    if cost is None or task.cost is None:
        return replace(task, waits=set(task.waits))
    late = cost.late if task.late >= 0 else task.late
    seconds = task.seconds + cost.seconds - task.cost.seconds
    return replace(task, waits=set(task.waits), seconds=seconds, cost=cost, late=late, busy=cost.busy)


def _devices(placements: Placements) -> set[Device]:
    every = (placement for of_role in placements.values() for placement in of_role.values())
    return {device for placement in every for device in placement.mesh.devices}


def _tasks(step: Step, hardware: Hardware, placements: Placements, streaming: bool) -> list[_Task]:
    tasks: list[_Task] = []
    moves: list[_Task] = []
    for call in step.calls:
        role, placement = step.roles[call.role], placements[call.role][call.kind]
        cost = Costs(role, hardware).of(call, placement.layout)
        home = placements[call.role].get("train") or next(iter(placements[call.role].values()))
        memory = Memory(role, hardware.machine)
        packed = cost.parts.get("pack", 0.0) if placement != home and "train" in placements[call.role] else 0.0
        away = 2 * memory.kept(home.layout, home.layout.coordinates(0)).leaving / hardware.host_rate
        tasks.append(
            _Task(
                name=call.name,
                kind="call",
                seconds=cost.seconds - packed + away * role.offloaded,
                devices=frozenset(placement.mesh.devices),
                waits=set(call.waits),
                cost=cost,
                streams=streaming and call.kind == "infer",
                late=cost.late if call.kind == "generate" else -1.0,
                busy=cost.busy,
                work=WORK[call.kind],
            )
        )
        if call.kind == "train":
            (moves if step.draws_ahead else tasks).extend(_moves(step, hardware, placements[call.role], call))
    tasks += moves
    return [*tasks, *_mixings(step, hardware, placements, tasks)]


def _moves(step: Step, hardware: Hardware, of_role: Mapping[Kind, Placement], call: PlannedCall) -> list[_Task]:
    home, role = of_role["train"], step.roles[call.role]
    table = shard_table(role.config, role.head)
    left_out = Memory(role).sizes.frozen_names
    dtypes = Dtypes(source=role.dtype, target=role.dtype)
    tasks = []
    for kind, target in of_role.items():
        if kind == "train":
            continue
        seconds = 0.0
        if target != home and max(home.layout.num_ranks, target.layout.num_ranks) > MAX_PLANNED:
            seconds = _counted(role, hardware, home, target, kind)
        elif target != home:
            made = plan(home, target, table, dtypes=dtypes, leave_out=left_out)
            moving = Moving(Memory(role, hardware.machine), hardware)
            seconds = _sending(hardware, made.sent, made.received, home, target)
            seconds += moving.checking(home.layout, target.layout, generates=kind == "generate")
        devices = frozenset((*home.mesh.devices, *target.mesh.devices))
        name = f"{call.role} to {kind}"
        moved = _Task(name=name, kind="move", seconds=seconds, devices=devices, waits={call.name})
        moved.busy = float(len(devices))
        tasks.append(moved)
    return tasks


def _counted(role: Role, hardware: Hardware, home: Placement, target: Placement, kind: Kind) -> float:
    """By the bytes of some ranks, of a move between many."""
    shift = home.mesh.rank_of(target.mesh.devices[0])
    far = len({device.host for device in (*home.mesh.devices, *target.mesh.devices)}) > 1
    moving = Moving(Memory(role, hardware.machine), hardware)
    return moving.seconds(home.layout, target.layout, shift, far=far, generates=kind == "generate")


def _counted_mixing(role: Role, hardware: Hardware, source: Placement, target: Placement) -> float:
    shift = source.mesh.rank_of(target.mesh.devices[0])
    far = len({device.host for device in (*source.mesh.devices, *target.mesh.devices)}) > 1
    return Moving(Memory(role), hardware).mixing_seconds(source.layout, target.layout, shift, far=far)


def _sending(
    hardware: Hardware, sent: Sequence[int], received: Sequence[int], home: Placement, target: Placement
) -> float:
    """By the busiest device; between hosts, unless senders stand on every receiver's host."""
    devices = {*home.mesh.devices, *target.mesh.devices}
    hosts = {device.host for device in devices}
    nested = set(target.mesh.devices) <= set(home.mesh.devices) or set(home.mesh.devices) <= set(
        target.mesh.devices
    )
    local = nested and home.layout.pipeline == 1 and home.layout.tensor <= hardware.per_host
    rate, delay = hardware.rate_between(1 if len(hosts) == 1 or local else hardware.per_host + 1)
    return max(max(sent, default=0), max(received, default=0)) / rate + 2 * delay


def _mixings(step: Step, hardware: Hardware, placements: Placements, tasks: Sequence[_Task]) -> list[_Task]:
    found = []
    for mixing in step.mixings:
        source = placements[mixing.source]["train"]
        target = next(iter(placements[mixing.target].values()))
        role = step.roles[mixing.source]
        exact = Dtypes(source="float32", target="float32")
        if max(source.layout.num_ranks, target.layout.num_ranks) > MAX_PLANNED:
            seconds = _counted_mixing(role, hardware, source, target)
        else:
            made = plan(source, target, shard_table(role.config, role.head), dtypes=exact, mix=True)
            held = Memory(role).sizes.held(target.layout, target.layout.coordinates(0)).total
            seconds = _sending(hardware, made.sent, made.received, source, target)
            seconds += 4 * FP32 * held / (hardware.memory_rate * hardware.memory_share)
        devices = frozenset((*source.mesh.devices, *target.mesh.devices))
        name = f"{mixing.source} into {mixing.target}"
        waits = {task.name for task in tasks}
        found.append(_Task(name=name, kind="mixing", seconds=seconds / mixing.every, devices=devices, waits=waits))
    return found


def _play(tasks: Sequence[_Task], hardware: Hardware) -> list[Event]:
    """Let every device work off its tasks in order, each as soon as its devices are free and may begin.

    Tasks that share a host's processors slow each other down for as long as both run.
    """
    queues: dict[Device, deque[_Task]] = {}
    for task in tasks:
        for device in task.devices:
            queues.setdefault(device, deque()).append(task)
    by_name = {task.name: task for task in tasks}
    waiting, running, done = list(tasks), dict[str, float](), dict[str, Event]()
    starts: dict[str, float] = {}
    now = 0.0
    while waiting or running:
        while ready := [t for t in waiting if _is_next(t, queues) and _may(t, running, done, by_name)]:
            for task in ready:  # a generation that begins may let others begin
                waiting.remove(task)
                starts[task.name], running[task.name] = now, task.seconds
        going = [by_name[name] for name in running if not _waits_for_last(by_name[name], running, by_name)]
        speeds = _speeds(going, hardware)
        passed = _until_next(waiting, running, speeds, by_name)
        now += passed
        for name in [task.name for task in going]:
            running[name] -= passed * speeds[name]
            if running[name] > SMALL or _waits_for_last(by_name[name], running, by_name):
                continue
            ended = by_name[name]
            del running[name]
            for device in ended.devices:
                queues[device].popleft()
            done[name] = Event(
                name=name,
                kind=ended.kind,
                start=starts[name],
                end=now,
                devices=ended.devices,
                cost=ended.cost,
            )
    return sorted(done.values(), key=lambda event: event.start)


def _speeds(tasks: Sequence[_Task], hardware: Hardware) -> dict[str, float]:
    """How fast each task gets on, beside the others: 1 is as fast as alone."""
    if hardware.profile is None or not hardware.cores or len(tasks) < 2:
        return {task.name: 1.0 for task in tasks}
    slow, busy = hardware.profile.slow, sum(task.busy for task in tasks)
    return {task.name: slow(task.work, task.busy) / slow(task.work, busy) for task in tasks}


def _until_next(
    waiting: Sequence[_Task],
    running: Mapping[str, float],
    speeds: Mapping[str, float],
    by_name: Mapping[str, _Task],
) -> float:
    """Until a task ends, has read what a generation has given, or one is so far that it may be read."""
    times = [running[name] / speed for name, speed in speeds.items()]
    times += [
        (running[name] - part) / speed
        for name, speed in speeds.items()
        for part in _held(by_name[name], running, by_name)
        if running[name] - part > SMALL
    ]
    for task in waiting:
        for name in task.waits & running.keys():
            earlier = by_name[name]
            if _reads_early(task, earlier):
                left = running[name] - (1 - _lead(task, earlier)) * earlier.seconds
                times += [left / speeds[name]] if left > SMALL else []
    return max(0.0, min(times))


def _held(task: _Task, running: Mapping[str, float], by_name: Mapping[str, _Task]) -> list[float]:
    """Of each generation that it reads and that goes on, its own seconds for what ends last."""
    read = [by_name[name] for name in task.waits & running.keys()]
    return [earlier.late * task.seconds for earlier in read if _reads_early(task, earlier)]


def _waits_for_last(task: _Task, running: Mapping[str, float], by_name: Mapping[str, _Task]) -> bool:
    """Whether it has read all but what a generation, which others slow down, has yet to give."""
    return any(running[task.name] <= part + SMALL for part in _held(task, running, by_name))


def _is_next(task: _Task, queues: Mapping[Device, deque[_Task]]) -> bool:
    return all(queues[device][0] is task for device in task.devices)


def _may(
    task: _Task, running: Mapping[str, float], done: Mapping[str, Event], by_name: Mapping[str, _Task]
) -> bool:
    """Whether all it waits for has ended, or is a generation elsewhere that it reads and that is far enough."""
    for name in task.waits - done.keys():
        earlier = by_name[name]
        if name not in running or not _reads_early(task, earlier):
            return False
        if running[name] > (1 - _lead(task, earlier)) * earlier.seconds + SMALL:
            return False
    return True


def _reads_early(task: _Task, earlier: _Task) -> bool:
    return task.streams and earlier.late >= 0 and not task.devices & earlier.devices


def _lead(task: _Task, earlier: _Task) -> float:
    """The part of a generation after which to begin, so that completions that end last are read after that."""
    if earlier.seconds <= 0:
        return 1.0
    return max(FIRST_PART, 1 - (1 - earlier.late) * task.seconds / earlier.seconds)


def peak_bytes(step: Step, hardware: Hardware, placements: Placements) -> dict[str, float]:
    """For each call and move, bytes on the device that needs the most, counted device by device."""
    step = offloading_there(step, hardware)
    memories = {name: Memory(role, hardware.machine) for name, role in step.roles.items()}
    kept: dict[Device, dict[str, int]] = {}
    for name, of_role in placements.items():
        for device in {device for placement in of_role.values() for device in placement.mesh.devices}:
            kept.setdefault(device, {})[name] = memories[name].on_device(of_role, device).total
    peaks = {}
    for call in step.calls:
        placement = placements[call.role][call.kind]
        working: dict[tuple[int, int], int] = {}
        most = 0
        for rank, device in enumerate(placement.mesh.devices):
            where = placement.layout.coordinates(rank)
            key = where.tensor, where.pipeline
            if key not in working:
                working[key] = memories[call.role].working(call, placement.layout, where).total
            resident = sum(
                size for name, size in kept[device].items() if name == call.role or not step.roles[name].offloaded
            )
            most = max(most, resident + working[key])
        peaks[call.name] = float(most)
    for name, role, (source, target), mixing in _moved(step, placements):
        resident = max(
            sum(size for other, size in kept[device].items() if other == role or not step.roles[other].offloaded)
            for device in {*source.mesh.devices, *target.mesh.devices}
        )
        peaks[name] = float(resident + memories[role].buffers(source.layout, target.layout, mixing=mixing))
    return peaks


def _moved(step: Step, placements: Placements) -> Iterator[tuple[str, str, tuple[Placement, Placement], bool]]:
    """Moves and mixings in which something may be sent: name, whose weights, from where to where, if it mixes."""
    for role in dict.fromkeys(call.role for call in step.calls if call.kind == "train"):
        home = placements[role]["train"]
        for kind, target in placements[role].items():
            if target != home:
                yield f"{role} to {kind}", role, (home, target), False
    for mixing in step.mixings:
        source, into = placements[mixing.source]["train"], next(iter(placements[mixing.target].values()))
        yield f"{mixing.source} into {mixing.target}", mixing.source, (source, into), True
