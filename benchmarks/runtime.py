"""`python -m benchmarks.runtime`: what the runtime adds to a PPO step over several processes, and overlap gains.

Calls wait instead of computing, for times in the proportions of a PPO step, and give batches of a real step's
size: so two processors can stand for as many devices as there are processes. A step is held against its calls one
after another, and against its longest chain of calls, below which no runtime can come but by streaming or by
drawing ahead (`max_staleness` 1), which are timed too. With calls that take no time what is left is the runtime's
own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import machine
from meshift.batch import Batch, Outcome, Ragged
from meshift.generation.rollout import OnPart
from meshift.graph.ahead import halves_of
from meshift.graph.calls import Call, Graph, HostCall, Kind, ModelCall
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.runtime.ahead import Queue
from meshift.runtime.spread_ahead import SpreadAhead
from meshift.runtime.spread_step import SpreadStep
from meshift.runtime.world import World
from meshift.step import run_step

NUM_PROCESSES = 4
PROMPT, COMPLETION = 256, 256
STEP_ROWS, FIRST_ENDS = 4, 0.33
"""Completions that end together, and the part of a generation after which the first ones do."""
PART_SIZE = 16
SECONDS = {
    "rollout": 0.40,
    "reward": 0.10,
    "reference": 0.12,
    "values": 0.12,
    "advantages": 0.01,
    "train_actor": 0.40,
    "train_critic": 0.36,
}
"""Of each call; proportions as in PPO with two epochs, actor and critic of one size."""
ALL = ("0-3", "d4t1p1")
PLANS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "all calls on all devices": dict.fromkeys(("actor", "critic", "reference", "reward"), ALL),
    "roles apart": {
        "actor": ("0", "d1t1p1"),
        "critic": ("1", "d1t1p1"),
        "reference": ("2", "d1t1p1"),
        "reward": ("3", "d1t1p1"),
    },
    "actor and critic apart": {
        "actor": ("0-1", "d2t1p1"),
        "critic": ("2-3", "d2t1p1"),
        "reference": ("0", "d1t1p1"),
        "reward": ("1", "d1t1p1"),
    },
    "drawing apart": {
        "actor": ("0-1", "d2t1p1"),
        "critic": ("2", "d1t1p1"),
        "reference": ("0", "d1t1p1"),
        "reward": ("1", "d1t1p1"),
    },
}
DRAWING = {"drawing apart": ("3", "d1t1p1")}
"""Where the actor draws, if not where it trains."""
ENDLESS = 10**9
"""Steps of a run that is only timed."""


@dataclass(kw_only=True)
class WaitingRole:
    """A role whose calls wait, and give what such a call gives."""

    name: str
    placement: Placement
    drawing: Placement
    world: World
    scale: float
    num_rows: int

    @property
    def home(self) -> Placement:
        """Where its weights would be."""
        return self.placement

    @property
    def placements(self) -> Mapping[Kind, Placement]:
        """Of its calls."""
        return {"generate": self.drawing, "infer": self.placement, "train": self.placement}

    def members(self, kind: Kind) -> tuple[int, ...]:
        """The processes of a call."""
        return self.world.members(self.placements[kind])

    def generate(self, task: str, batch: Batch, on_part: OnPart | None = None) -> Outcome:
        """Completions, of which the first end after a third of the time, as ragged ones do."""
        rows = list(range(len(batch)))
        mine = rows if on_part is None else rows[self._place :: len(self.members("generate"))]
        for first in range(0, len(mine), STEP_ROWS):
            begun = (FIRST_ENDS if first == 0 else 0.0) + (1 - FIRST_ENDS) * STEP_ROWS / len(mine)
            time.sleep(SECONDS[task] * self.scale * begun)
            if on_part is not None:
                some = mine[first : first + STEP_ROWS]
                on_part(some, _completions(len(some)))
        return Outcome(batch=_completions(len(batch)))

    @property
    def _place(self) -> int:
        return self.members("generate").index(self.world.rank)

    def infer(self, task: str, batch: Batch) -> Outcome:
        """One number a token, in a time that goes by the rows."""
        time.sleep(SECONDS[task] * self.scale * len(batch) / self.num_rows)
        return Outcome(batch=Batch({f"{task}_out": _floats(len(batch))}))

    def train(self, task: str, batch: Batch, *, step: int) -> Outcome:
        """Metrics."""
        self._wait(task)
        return Outcome(metrics={f"{task}/loss": 0.0})

    def publish(self) -> dict[str, float]:
        """Nothing moves: `benchmarks.realloc` times that."""
        return {}

    @property
    def version(self) -> int:
        """There are no weights."""
        return 0

    def master_weights(self) -> dict[str, Any]:
        """There are none."""
        return {}

    def mix(self, source: Any, rate: float) -> None:
        """There is nothing to mix."""

    def _wait(self, task: str) -> None:
        time.sleep(SECONDS[task] * self.scale)


def graph() -> Graph:
    """The calls of PPO with a reward model."""

    def advantages(batch: Batch) -> Outcome:
        return Outcome(batch=Batch({"advantages": _floats(len(batch))}))

    def infer(name: str, role: str) -> ModelCall:
        return ModelCall(
            name=name, role=role, kind="infer", task=name, reads=("tokens", "lengths"), writes=(f"{name}_out",)
        )

    def train(name: str, role: str, reads: tuple[str, ...]) -> ModelCall:
        reads = ("tokens", "lengths", "advantages", *reads)
        return ModelCall(name=name, role=role, kind="train", task=name, reads=reads)

    outs = ("reward_out", "reference_out", "values_out")
    calls: tuple[Call, ...] = (
        ModelCall(
            name="rollout",
            role="actor",
            kind="generate",
            task="rollout",
            reads=("prompts",),
            writes=("tokens", "lengths", "logprobs"),
        ),
        infer("reward", "reward"),
        infer("reference", "reference"),
        infer("values", "critic"),
        HostCall(name="advantages", function=advantages, reads=("logprobs", *outs), writes=("advantages",)),
        train("train_actor", "actor", ("logprobs",)),
        train("train_critic", "critic", ("values_out",)),
    )
    return Graph(calls, frozenset({"prompts"}))


def longest_chain(made: Graph, members: Mapping[str, tuple[int, ...]], scale: float) -> float:
    """Seconds until all is done, were nothing to take time but the calls.

    Each begins when what it waits for and its processes are ready.
    """
    done: dict[str, float] = {}
    free = [0.0] * NUM_PROCESSES
    for call in made.order():
        ranks = members[call.name]
        begins = max(
            [*(done[name] for name in made.edges[call.name]), *(free[rank] for rank in ranks)], default=0.0
        )
        done[call.name] = begins + (SECONDS[call.name] * scale if call.name != "advantages" else 0.0)
        for rank in ranks:
            free[rank] = done[call.name]
    return max(done.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every plan; prints the JSON too."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__.splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    made.add_argument("--rounds", type=int, default=7, help="timed steps of each plan (default: 7)")
    made.add_argument("--sequences", type=int, default=128, help="of a step, of 512 tokens each (default: 128)")
    given = made.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="meshift-benchmark-") as folder:
        context = multiprocessing.get_context("spawn")
        arguments_of = [(rank, folder, given.rounds, given.sequences) for rank in range(NUM_PROCESSES)]
        gang = [context.Process(target=member, args=one) for one in arguments_of]
        for process in gang:
            process.start()
        for process in gang:
            process.join()
        if any(process.exitcode for process in gang):
            return 1
        rows = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "torch": torch.__version__,
        "sequences": given.sequences,
        "tokens_per_sequence": PROMPT + COMPLETION,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def member(rank: int, folder: str, num_rounds: int, num_sequences: int) -> None:
    """One process: every plan, waiting and not; the first writes the rows."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES)
    ranks = {Device(index=i): i for i in range(NUM_PROCESSES)}
    world = World(rank=rank, ranks=ranks, group=dist.new_group(list(range(NUM_PROCESSES)), backend="gloo"))
    lengths = torch.full((num_sequences,), PROMPT)
    prompts = Ragged(torch.zeros(num_sequences * PROMPT, dtype=torch.int64), lengths)
    batch = Batch({"prompts": prompts})
    rows = [row_of(name, world, batch, num_rounds) for name in PLANS]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def row_of(name: str, world: World, batch: Batch, num_rounds: int) -> dict[str, Any]:
    """One plan's figures."""
    made = graph()
    seconds = {}
    for scale in (1.0, 0.0):
        roles = _roles(name, world, scale, len(batch))
        spread, streamed = (SpreadStep(made, roles, world, size) for size in (None, PART_SIZE))  # type: ignore[arg-type]
        sides: tuple[Callable[[], object], ...] = (
            partial(spread.run, batch, 0),
            partial(run_step, made, roles, batch, 0),
            partial(streamed.run, batch, 0),
            _ahead(made, roles, world, batch),
        )
        taken: tuple[list[float], ...] = ([], [], [], [])
        for number in range(1 + num_rounds):
            for side, times in zip(sides, taken, strict=True):
                found = slowest(side)
                times.extend([found] if number else [])  # the first one warms up
        seconds[scale] = tuple(median(times) for times in taken)
    members = {
        call.name: roles[call.role].members(call.kind) if isinstance(call, ModelCall) else (0,)
        for call in made.order()
    }
    chain, num_calls = longest_chain(made, members, 1.0), len(made.order())
    step_seconds, turn_seconds, streamed_seconds, ahead_seconds = seconds[1.0]
    return {
        "plan": name,
        "placements": {role: f"{layout}@{mesh}" for role, (mesh, layout) in PLANS[name].items()},
        "ranks": NUM_PROCESSES,
        "seconds": step_seconds,
        "one_after_another_seconds": turn_seconds,
        "longest_chain_seconds": chain,
        "streamed_seconds": streamed_seconds,
        "ahead_seconds": ahead_seconds,
        "gain_of_overlap": turn_seconds / step_seconds,
        "gain_of_streaming": step_seconds / streamed_seconds,
        "gain_of_drawing_ahead": step_seconds / ahead_seconds,
        "over_longest_chain": step_seconds / chain,
        "overhead_ms_per_call": 1000 * (step_seconds - chain) / num_calls,
        "empty_step_ms_per_call": 1000 * seconds[0.0][0] / num_calls,
        "one_process_ms_per_call": 1000 * seconds[0.0][1] / num_calls,
    }


def _roles(name: str, world: World, scale: float, num_rows: int) -> dict[str, WaitingRole]:
    return {
        role: WaitingRole(
            name=role,
            placement=Placement.parse(*where),
            drawing=Placement.parse(*(DRAWING.get(name, where) if role == "actor" else where)),
            world=world,
            scale=scale,
            num_rows=num_rows,
        )
        for role, where in PLANS[name].items()
    }


def _ahead(made: Graph, roles: Mapping[str, WaitingRole], world: World, batch: Batch) -> Callable[[], object]:
    """A step more each time, on what was drawn one step before; the first one draws twice."""
    steps, queue = count(), Queue(1, ENDLESS)
    ahead = SpreadAhead(halves_of(made), roles, world, queue, lambda step: batch)  # type: ignore[arg-type]
    return lambda: ahead.run(batch, next(steps))


def slowest(side: Callable[[], object]) -> float:
    """Seconds until the last process is done, all having begun together."""
    dist.barrier()
    started = time.perf_counter()
    side()
    seconds = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(seconds)


def _completions(num_rows: int) -> Batch:
    lengths = torch.full((num_rows,), COMPLETION)
    tokens = Ragged(torch.zeros(num_rows * (PROMPT + COMPLETION), dtype=torch.int64), lengths + PROMPT)
    return Batch({"tokens": tokens, "lengths": Ragged.scalars(lengths), "logprobs": _floats(num_rows)})


def _floats(num_rows: int) -> Ragged:
    return Ragged(torch.zeros(num_rows * COMPLETION), torch.full((num_rows,), COMPLETION))


if __name__ == "__main__":
    raise SystemExit(main())
