"""`python -m benchmarks.reallocation`: moving a model between layouts of processes, beside broadcasting.

Rounds alternate: ours, broadcast, a copy of the wanted bytes within memory (the limit). Seconds are those of the
slowest process, medians over the rounds.
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
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import machine
from meshift.layout.boxes import Box, boxes_of, cells_of, count_layers, shape_of, stages_of
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.layout.shard import Shard
from meshift.models.hf.load import load_config
from meshift.models.shards import shard_table
from meshift.realloc.execute import Reallocation, Site
from meshift.realloc.plan import plan
from meshift.runtime.models import model_folder

MODEL = "pypi:smollm2-135m-instruct"
NUM_PROCESSES = 4
PAIRS = (
    ("0-3", "d2t2p1", "0-3", "d1t4p1"),
    ("0-3", "d4t1p1s", "0-3", "d4t1p1"),
    ("0-3", "d4t1p1s", "0-3", "d2t2p1"),
    ("0-3", "d1t2p2", "0-3", "d2t2p1"),
    ("0-1", "d1t2p1", "2-3", "d2t1p1"),
)
Shards = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process knows of a pair of placements."""

    source: Placement
    target: Placement
    table: Mapping[str, Shard]
    site: Site

    def boxes(self, placement: Placement) -> dict[str, Box]:
        """This device's, of a placement; none where it is not in it."""
        rank = placement.mesh.rank_of(self.site.device)
        return {} if rank is None else boxes_of(placement.layout, self.table, rank)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.reallocation", description=__doc__.splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    made.add_argument("--rounds", type=int, default=5, help="timed rounds of each side (default: 5)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every pair; prints the JSON too."""
    given = parser().parse_args(arguments)
    model_folder(MODEL)  # obtained once, not by every process
    with tempfile.TemporaryDirectory(prefix="meshift-benchmark-") as folder:
        context = multiprocessing.get_context("spawn")
        gang = [context.Process(target=member, args=(rank, folder, given.rounds)) for rank in range(NUM_PROCESSES)]
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
        "model": MODEL,
        "num_processes": NUM_PROCESSES,
        "rows": rows,
    }
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def member(rank: int, folder: str, num_rounds: int) -> None:
    """One process: every pair; the first writes the rows."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", NUM_PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_PROCESSES)
    devices = [Device(index=i) for i in range(NUM_PROCESSES)]
    site = Site(device=devices[rank], ranks={device: i for i, device in enumerate(devices)})
    table = shard_table(load_config(model_folder(MODEL)), "lm")
    rows = []
    for source_mesh, source_layout, target_mesh, target_layout in PAIRS:
        source = Placement.parse(source_mesh, source_layout)
        target = Placement.parse(target_mesh, target_layout)
        rows.append(timed(Case(source=source, target=target, table=table, site=site), num_rounds))
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def timed(case: Case, num_rounds: int) -> dict[str, Any]:
    """Seconds by side for one pair, and bytes."""
    started = time.perf_counter()
    made = plan(case.source, case.target, case.table)
    there = Reallocation(made, case.table, case.site)
    planned = time.perf_counter() - started
    held = {name: whole(case.table[name])[_slices(box)].clone() for name, box in case.boxes(case.source).items()}
    new = there.run(held).shards
    aliases = {alias.name for alias in made.share(case.site.device).aliases}
    copy = {name: shard.clone() for name, shard in new.items() if name not in aliases}
    memory = {name: torch.empty_like(shard) if name in copy else shard.clone() for name, shard in new.items()}
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: there.run(held, memory),
        "verify": lambda: there.verify(held, new),
        "broadcast": lambda: broadcast(case, held, memory),
        "copy": lambda: [memory[name].copy_(shard) for name, shard in copy.items()],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 + num_rounds):
        for name, side in sides.items():
            taken = _slowest(side)
            seconds[name] += [taken] if number else []  # the first round warms up
            assert all(torch.equal(memory[n], shard) for n, shard in new.items() if name != "verify"), name
    middle = {name: median(some) for name, some in seconds.items()}
    return {
        "source": str(case.source),
        "target": str(case.target),
        "plan_seconds": planned,
        "wire_bytes": made.wire_bytes,
        "copied_bytes": made.copied_bytes,
        "aliased_bytes": made.aliased_bytes,
        "seconds": middle,
        "over_copy": middle["ours"] / middle["copy"],
        "broadcast_over_ours": middle["broadcast"] / middle["ours"],
        "rounds": seconds,
    }


def whole(shard: Shard) -> Tensor:
    """Numbers for a parameter, the same in every process."""
    draw = torch.Generator().manual_seed(shard.num_elements)
    return torch.randn(shard.shape, generator=draw).bfloat16()


def broadcast(case: Case, held: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
    """The plain way: every box of every parameter goes to everybody, who puts it together and takes a slice."""
    wanted, layout = case.boxes(case.target), case.source.layout
    for name, shard in case.table.items():
        together = torch.empty(shard.shape, dtype=torch.bfloat16)
        stages = stages_of(shard, layout, count_layers(case.table))[:1]
        for box, ranks in cells_of(shard, layout, stages).items():
            sender = case.site.ranks[case.source.mesh.devices[ranks[0]]]
            data = held[name] if sender == dist.get_rank() else torch.empty(shape_of(box), dtype=torch.bfloat16)
            dist.broadcast(data, sender)
            together[_slices(box)].copy_(data)
        if name in wanted:
            memory[name].copy_(together[_slices(wanted[name])])


def _slowest(side: Callable[[], object]) -> float:
    """Seconds until the last process is done, all having begun together."""
    dist.barrier()
    started = time.perf_counter()
    side()
    taken = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*interval) for interval in box)


if __name__ == "__main__":
    raise SystemExit(main())
