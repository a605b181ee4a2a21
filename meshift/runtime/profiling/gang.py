"""What processes of one host cost each other: messages between them, and the same work in several at a time.

Each process of a gang runs `measure`; those whose turn it is not wait at a barrier, as they would in a step. It
knows nothing of how a gang is started.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from meshift.counted import counted
from meshift.generation.fused import FusedDecoder
from meshift.models.hf.families import read_config
from meshift.parallel.groups import new_group
from meshift.planner.profile import Message
from meshift.runtime.observer import Observer
from meshift.runtime.profiling.models import Effort, made, narrowed, numbers_of_layer
from meshift.runtime.profiling.products import CONFIG, Call, Work, decode_step, forward, there_and_back
from meshift.training.optimizer import MasterAdamW

ENTRY = "meshift.runtime.profiling.gang:measure"
ROWS, LIVE, LAYERS = 128, 4, 4
"""Of the passes and of the decode steps that are run by several at a time."""
SIZES = (1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 25)
"""Bytes of messages."""
MOST_ROWS = 512
PER_MESSAGE = 0.2
"""Seconds of sending messages of one size."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a gang is told: the model's raw config, the type, and seconds for each kind of work."""

    config: dict[str, Any]
    dtype: str
    seconds: float

    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))


def measure(argument: str, rank: int, num_processes: int, observer: Observer) -> dict[str, Any] | None:
    """In process 0: `crowding` and `messages` of `planner.profile.Profile`, as values of JSON."""
    asked = Asked(**json.loads(argument))
    if rank == 0:
        observer.on_message("messages between processes")
    config = narrowed(read_config(asked.config, "the profile's model"), 1, LAYERS)
    effort = Effort(seconds=asked.seconds)
    work = Work(model=made(config, getattr(torch, asked.dtype), torch.device("cpu")), effort=effort)
    messages = _messages(rank, num_processes, (numbers_of_layer(work.model), config.hidden_size))
    if rank == 0:
        observer.on_message("the same work in several processes at a time")
    crowding: dict[str, dict[str, float]] = {}
    turns = [(kind, call, n) for kind, call in _kinds(work).items() for n in range(1, num_processes + 1)]
    alone = 0.0
    for kind, call, count in counted(turns, "turns", lambda: len(turns)):
        seconds = _at_once(call, rank, count, asked.seconds)
        alone = seconds if count == 1 else alone
        crowding.setdefault(kind, {})[str(count)] = max(1.0, seconds / alone)
    return {"crowding": crowding, "messages": [asdict(one) for one in messages]} if rank == 0 else None


def _kinds(work: Work) -> dict[str, Call]:
    optimizer = MasterAdamW(work.model, CONFIG)
    both = there_and_back(work, ROWS)
    with torch.inference_mode():
        decoder = FusedDecoder(work.model)
        decoder.refresh()
        step = decode_step(work, decoder, LIVE)

    def decode() -> None:
        with torch.inference_mode():
            step()

    for master in optimizer.masters:
        master.grad = torch.full_like(master, 1e-4)

    def pack() -> None:
        with torch.inference_mode():
            packer.release()
            packer.refresh()

    packer = FusedDecoder(work.model)
    packing = {"pack": pack} if packer.packs else {}
    return {
        **packing,
        "decode": decode,
        "forward": forward(work, ROWS),
        "backward": both,
        "update": lambda: optimizer.step(1e-9),
    }


def _at_once(call: Call, rank: int, count: int, seconds: float) -> float:
    """Seconds of a call while the first `count` processes make it over and over; the mean."""
    dist.barrier()
    taken: list[float] = []
    if rank < count:
        call()
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(taken) < 3:
            started = time.perf_counter()
            call()
            taken.append(time.perf_counter() - started)
    found = torch.tensor([sum(taken) / len(taken) if taken else 0.0], dtype=torch.float64)
    dist.all_reduce(found)
    return float(found) / count


def _messages(rank: int, num_processes: int, layer: tuple[int, int]) -> list[Message]:
    """Of all kinds; `late` ones come after products, as those of tensor ranks do, and wait for who is late."""
    found = []
    sizes = [
        (members, among)
        for members in range(2, num_processes + 1)
        for among in sorted({members, num_processes // members * members})
    ]
    for members, among in counted(sizes, "sizes of groups", lambda: len(sizes)):
        lines = [list(range(first, first + members)) for first in range(0, among, members)]
        groups = [new_group(line) for line in lines]
        group = next((g for g, line in zip(groups, lines, strict=True) if rank in line), None)
        for kind, make in (("sum", _sum), ("late", _late), ("gather", _gather), ("send", _send)):
            if kind == "send" and (members, among) != (2, 2):
                continue
            for size in SIZES[: -1 if kind == "late" else None]:
                work = _products(size, members, layer) if kind == "late" else _nothing
                call = make(size, members, group, rank)
                seconds = _repeated(work, call, group, rank < among)
                found.append(Message(kind=kind, members=members, among=among, num_bytes=size, seconds=seconds))
    return found


def _nothing() -> None:
    """What comes before a message that nobody waits for."""


def _products(size: int, members: int, layer: tuple[int, int]) -> Call:
    """As many rows as the message has, through a tensor rank's part of half a layer (numbers, hidden size)."""
    numbers, hidden = layer
    rows = max(1, min(MOST_ROWS, size // (4 * hidden)))
    inner = max(1, numbers // (4 * hidden * members))
    x, up, down = torch.randn(rows, hidden), torch.randn(hidden, inner), torch.randn(inner, hidden)
    return lambda: (x @ up) @ down


def _repeated(work: Call, call: Call, group: dist.ProcessGroup | None, takes_part: bool) -> float:
    """Seconds of one message more than of the work before it, on average over those who take part."""

    def both() -> None:
        work()
        call()

    dist.barrier()
    seconds = 0.0
    if takes_part:
        both()
        started = time.perf_counter()
        both()
        once = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
        dist.all_reduce(once, dist.ReduceOp.MAX, group=group)  # all are to make as many
        count = max(5, min(200, int(PER_MESSAGE / max(1e-5, float(once)))))
        alone = _mean(work, count)
        dist.barrier(group=group)
        seconds = _mean(both, count) - alone
    whole = torch.tensor([seconds, float(takes_part)], dtype=torch.float64)
    dist.all_reduce(whole)
    return max(float(whole[0] / whole[1]), 1e-6)


def _mean(call: Call, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - started) / count


def _sum(size: int, members: int, group: dist.ProcessGroup | None, rank: int) -> Call:
    numbers = torch.ones(size // 4)
    return lambda: dist.all_reduce(numbers, group=group)


def _late(size: int, members: int, group: dist.ProcessGroup | None, rank: int) -> Call:
    numbers = torch.ones(size // 4)
    return lambda: dist.all_reduce(numbers.clone(), group=group)


def _gather(size: int, members: int, group: dist.ProcessGroup | None, rank: int) -> Call:
    own = torch.ones(max(1, size // members // 4))
    every = [torch.empty_like(own) for _ in range(members)]
    return lambda: dist.all_gather(every, own, group=group)


def _send(size: int, members: int, group: dist.ProcessGroup | None, rank: int) -> Callable[[], None]:
    numbers = torch.ones(size // 8)  # there and back again: half of it each way

    def run() -> None:
        for sender in (0, 1):
            if rank == sender:
                dist.send(numbers, 1 - sender, group=group)
            else:
                dist.recv(numbers, sender, group=group)

    return run
