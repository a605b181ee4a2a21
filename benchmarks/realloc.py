"""`python -m benchmarks.realloc`: moving a model between layouts of processes, beside usual ways and the limit.

Sides take turns in one run: ours over shared memory and over the wire; a full state dict brought together in one
process and given to all; every parameter broadcast; files in safetensors through the page cache; and a copy of the
same bytes within each process, the limit. Seconds are those of the slowest process, medians over the rounds.
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
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import machine
from meshift.layout.boxes import Box, boxes_of, cells_of, count_layers, num_elements, shape_of, stages_of
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Device, Mesh
from meshift.layout.shard import Shard
from meshift.models.hf.families import read_config
from meshift.models.hf.load import load_config
from meshift.models.shards import shard_table
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import Peers
from meshift.realloc.execute import Reallocation, Site
from meshift.realloc.near import NearMemory
from meshift.realloc.plan import plan
from meshift.runtime.models import model_folder
from meshift.training.stored_tensors import StoredTensors, write_boxes

SMALL = "pypi:smollm2-135m-instruct"
LLAMA: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}
ONE_B = LLAMA | {  # 6 of its 16 layers: the sides together hold eight copies in 24 GB
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SEVENTY_B = LLAMA | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
PAIRS = {
    2: (("0-1", "d2t1p1", "0-1", "d1t2p1"), ("0-1", "d1t2p1", "0-1", "d2t1p1"), ("0", "d1t1p1", "1", "d1t1p1")),
    4: (
        ("0-3", "d2t2p1", "0-3", "d4t1p1"),
        ("0-3", "d2t2p1", "0-3", "d1t4p1"),
        ("0-3", "d4t1p1s", "0-3", "d4t1p1"),
        ("0-3", "d4t1p1s", "0-3", "d2t2p1"),
        ("0-3", "d1t2p2", "0-3", "d2t2p1"),
        ("0-1", "d1t2p1", "2-3", "d2t1p1"),
        ("0-3", "d1t4p1", "3-0", "d2t2p1"),
    ),
}
LARGE_PAIRS = {2: PAIRS[2][:2], 4: PAIRS[4][1:2]}
MODELS = {"smollm2-135m": PAIRS, "llama-1.2b": LARGE_PAIRS}
Shards = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one process knows of a pair of placements."""

    source: Placement
    target: Placement
    table: Mapping[str, Shard]
    site: Site
    folder: Path

    def boxes(self, placement: Placement, device: Device | None = None) -> dict[str, Box]:
        """A device's (this one's), of a placement; none where it is not in it."""
        rank = placement.mesh.rank_of(device or self.site.device)
        return {} if rank is None else boxes_of(placement.layout, self.table, rank)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.realloc", description=__doc__.splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    made.add_argument("--rounds", type=int, default=5, help="timed rounds of each side (default: 5)")
    made.add_argument("--models", default=",".join(MODELS), metavar="NAMES", help="of %(default)s")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every pair; prints the JSON too."""
    given = parser().parse_args(arguments)
    model_folder(SMALL)  # obtained once, not by every process
    rows: list[dict[str, Any]] = []
    for model in given.models.split(","):
        for num_processes, some in MODELS[model].items():
            found = run(model, num_processes, some, given.rounds)
            if found is None:
                return 1
            rows += found
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "torch": torch.__version__,
        "rows": rows,
        "planning": planning(),
    }
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def run(
    model: str, num_processes: int, pairs: Sequence[tuple[str, ...]], rounds: int
) -> list[dict[str, Any]] | None:
    """The rows of some pairs; None where a process failed."""
    with tempfile.TemporaryDirectory(prefix="meshift-benchmark-") as folder:
        context = multiprocessing.get_context("spawn")
        arguments = [(rank, num_processes, model, pairs, folder, rounds) for rank in range(num_processes)]
        gang = [context.Process(target=member, args=given) for given in arguments]
        for process in gang:
            process.start()
        for process in gang:
            process.join()
        if any(process.exitcode for process in gang):
            return None
        found: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
        return found


def table_of(model: str) -> Mapping[str, Shard]:
    """The shard table of one of the models."""
    config = load_config(model_folder(SMALL)) if model == "smollm2-135m" else read_config(ONE_B, model)
    return shard_table(config, "lm")


def planning() -> list[dict[str, Any]]:
    """Seconds to plan for 1,024 ranks and 80 layers, once each."""
    table = shard_table(read_config(SEVENTY_B, "70B"), "lm")
    rows = []
    for source, target in (("d16t8p8", "d128t8p1"), ("d128t8p1s", "d128t8p1"), ("d64t8p2", "d32t8p4")):
        mesh = Mesh(devices=tuple(Device(index=i) for i in range(1024)))
        started = time.perf_counter()
        ends = [Placement(mesh=mesh, layout=Layout.parse(one)) for one in (source, target)]
        made = plan(ends[0], ends[1], table)
        rows.append({"source": source, "target": target, "ranks": 1024, "layers": 80})
        rows[-1] |= {"seconds": time.perf_counter() - started, "transfers": made.num_transfers}
    return rows


def member(
    rank: int, num_processes: int, model: str, pairs: Sequence[tuple[str, ...]], folder: str, rounds: int
) -> None:
    """One process: every pair; the first writes the rows."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_processes)
    devices = [Device(index=i) for i in range(num_processes)]
    site = Site(device=devices[rank], ranks={device: i for i, device in enumerate(devices)})
    rows = []
    for source_mesh, source_layout, target_mesh, target_layout in pairs:
        source = Placement.parse(source_mesh.replace("3-0", "3,2,1,0"), source_layout)
        target = Placement.parse(target_mesh.replace("3-0", "3,2,1,0"), target_layout)
        case = Case(source=source, target=target, table=table_of(model), site=site, folder=Path(folder))
        rows.append({"model": model, **timed(case, rounds)})
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.destroy_process_group()


def timed(case: Case, num_rounds: int) -> dict[str, Any]:
    """Seconds by side for one pair, and bytes."""
    started = time.perf_counter()
    made = plan(case.source, case.target, case.table)
    wire, near = (Reallocation(made, case.table, case.site) for _ in "wn")
    planned = time.perf_counter() - started
    boxes = case.boxes(case.source)
    shared = NearMemory.make({name: (shape_of(box), torch.bfloat16) for name, box in boxes.items()})
    held = shared.tensors
    for name, box in boxes.items():
        held[name].copy_(whole(case.table[name])[_slices(box)])
    everybody = Peers(ranks=tuple(range(dist.get_world_size())), index=dist.get_rank(), group=dist.group.WORLD)
    where = gather_facts(shared.where, everybody)
    ranks = [case.site.ranks[device] for device in case.source.mesh.devices]
    near.near = {rank: NearMemory.open(where[ranks[rank]], form) for rank, form in near.senders().items()}
    arrived = wire.run(held)
    aliases = {alias.name for alias in made.share(case.site.device).aliases}
    memory = {n: torch.empty_like(shard) if n not in aliases else shard for n, shard in arrived.shards.items()}
    own = {name: shard.clone() for name, shard in arrived.shards.items() if name not in aliases}
    sides: dict[str, Callable[[], object]] = {
        "ours": lambda: near.run(held, memory),
        "ours over the wire": lambda: wire.run(held, memory),
        "verify": lambda: near.verify(held, arrived.shards),
        "full state dict": lambda: full_state_dict(case, held, memory),
        "broadcast": lambda: broadcast(case, held, memory),
        "safetensors": lambda: through_files(case, held, memory),
        "memcpy": lambda: [memory[name].copy_(shard) for name, shard in own.items()],
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(1 + num_rounds):
        for name, side in sides.items():
            for shard in (memory[n] for n in own):
                shard.zero_() if name not in ("verify", "memcpy") else None
            taken = _slowest(side)
            seconds[name] += [taken] if number else []  # the first round warms up
            assert all(torch.equal(memory[n], shard) for n, shard in own.items()), name
    middle = {name: median(some) for name, some in seconds.items()}
    moved = sum(gather_facts(arrived.received_bytes, everybody))
    peers = {n: middle[n] / middle["ours"] for n in ("full state dict", "broadcast", "safetensors")}
    return {
        "source": str(case.source),
        "target": str(case.target),
        "ranks": dist.get_world_size(),
        "seconds": middle["ours"],
        "over_memcpy": middle["ours"] / middle["memcpy"],
        "bytes": moved,
        "bytes_over_bound": moved / bound if (bound := least_bytes(case)) else 1.0,
        "copied_bytes": made.copied_bytes,
        "aliased_bytes": made.aliased_bytes,
        "plan_seconds": planned,
        "over_ours": peers,
        "all_seconds": middle,
        "rounds": seconds,
    }


def least_bytes(case: Case) -> int:
    """Of every target rank's boxes what its device does not hold, in bytes: without any plan, box by box."""
    total = 0
    for device in case.target.mesh.devices:
        held, wanted = case.boxes(case.source, device), case.boxes(case.target, device)
        for name, box in wanted.items():
            there = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, held.get(name, box), strict=True))
            is_there = name in held and all(stop > start for start, stop in there)
            total += num_elements(box) - (num_elements(there) if is_there else 0)
    return total * torch.bfloat16.itemsize


def whole(shard: Shard) -> Tensor:
    """Numbers for a parameter, the same in every process."""
    draw = torch.Generator().manual_seed(shard.num_elements)
    return torch.randint(-128, 128, shard.shape, generator=draw, dtype=torch.int8).to(torch.bfloat16)


def cells(case: Case) -> list[tuple[str, Box, int]]:
    """Every box of every parameter, once, with the process that gives it."""
    layout, num_layers, found = case.source.layout, count_layers(case.table), []
    for name, shard in case.table.items():
        for box, ranks in cells_of(shard, layout, stages_of(shard, layout, num_layers)[:1]).items():
            found.append((name, box, case.site.ranks[case.source.mesh.devices[ranks[0]]]))
    return found


def full_state_dict(case: Case, held: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
    """The usual way: process 0 brings the whole model together and gives it to all, who take their slices."""
    together: Shards = {name: torch.empty(shard.shape, dtype=torch.bfloat16) for name, shard in case.table.items()}
    for name, box, sender in cells(case):
        view = together[name][_slices(box)]
        if dist.get_rank() == 0:
            data = held[name] if sender == 0 else torch.empty(shape_of(box), dtype=torch.bfloat16)
            if sender:
                dist.recv(data.view(torch.uint8), sender)
            view.copy_(data)
        elif dist.get_rank() == sender:
            dist.send(held[name].view(torch.uint8), 0)
    wanted = case.boxes(case.target)
    for name, data in together.items():
        dist.broadcast(data, 0)
        if name in wanted:
            memory[name].copy_(data[_slices(wanted[name])])


def broadcast(case: Case, held: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
    """The plain way: every box of every parameter goes to everybody, who puts it together and takes a slice."""
    wanted = case.boxes(case.target)
    for name, parts in groupby(cells(case), key=lambda cell: cell[0]):
        together = torch.empty(case.table[name].shape, dtype=torch.bfloat16)
        for _, box, sender in parts:
            data = held[name] if sender == dist.get_rank() else torch.empty(shape_of(box), dtype=torch.bfloat16)
            dist.broadcast(data, sender)
            together[_slices(box)].copy_(data)
        if name in wanted:
            memory[name].copy_(together[_slices(wanted[name])])


def through_files(case: Case, held: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> None:
    """Every process writes the boxes that it gives, and reads those that it wants."""
    folder = case.folder / f"{case.source} to {case.target}"
    folder.mkdir(exist_ok=True)
    boxes = {n: (box, case.table[n].shape) for n, box, sender in cells(case) if sender == dist.get_rank()}
    if boxes:
        write_boxes(folder, dist.get_rank(), {name: held[name] for name in boxes}, boxes)
    dist.barrier()
    wanted = case.boxes(case.target)
    stored = StoredTensors(folder, lambda name, shape: wanted[name])
    for name in wanted:
        memory[name].copy_(stored[name])
    dist.barrier()


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
