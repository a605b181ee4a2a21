"""`python -m benchmarks.layouts`: one update, one reading and one rollout of a model in each layout, side by side.

Every layout does the same work on the same rows, in as many processes as it has ranks; a call's time is its
slowest process's. Processors are shared out to the processes; where these are more than processors, so is their
time, and then what is measured is the work in all, communication and waiting included. It knows nothing of plans.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import machine
from meshift.algorithms.losses import PolicyLoss
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import Peers, join
from meshift.parallel.pipeline import cut_for
from meshift.runtime.models import compute_dtype, model_folder, open_model
from meshift.runtime.peaks import PREFIX, PeakMeter
from meshift.runtime.role import LocalRole
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

MODEL = "pypi:smollm2-135m-instruct"
LAYOUTS = {
    1: ("d1t1p1",),
    2: ("d2t1p1", "d1t2p1", "d1t1p2", "d2t1p1s"),
    4: ("d4t1p1", "d2t2p1", "d1t4p1", "d2t1p2", "d1t2p2", "d1t1p4", "d4t1p1s", "d2t1p2s"),
}
NUM_ROWS, PROMPT, COMPLETION = 32, 64, 64
CONFIG = TrainableConfig(max_tokens_per_micro_batch=2048)
READING = TokenLogprobs(with_entropy=True)
TASK = TrainTask(loss=PolicyLoss(reading=READING))
SAMPLING = SamplingTask(params=SamplingParams(max_new_tokens=COMPLETION, min_new_tokens=COMPLETION), seed=1)
CALLS = ("generate", "infer", "train")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.layouts", description=__doc__.splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    made.add_argument("--rounds", type=int, default=3, help="timed rounds (default: 3)")
    made.add_argument("--model", default=MODEL, help="default: %(default)s")
    made.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16 (default: auto)")
    made.add_argument("--processes", default="1,2,4", help="numbers of processes (default: 1,2,4)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every layout, one after another in each round; prints the JSON too."""
    given = parser().parse_args(arguments)
    model_folder(given.model)  # obtained once, not by every process
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(given.rounds):
        for count in map(int, given.processes.split(",")):
            for layout in LAYOUTS[count]:
                row = run(layout, count, given.model, given.dtype)
                if row is None:
                    return 1
                found.setdefault(layout, []).append(row)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "torch": torch.__version__,
        "model": given.model,
        "rows": [summed_up(layout, rows) for layout, rows in found.items()],
    }
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def summed_up(layout: str, rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    calls = {call: {key: median(one[call][key] for one in rounds) for key in rounds[0][call]} for call in CALLS}
    return {"layout": layout, "processes": rounds[0]["processes"], "threads": rounds[0]["threads"], **calls}


def run(layout: str, count: int, model: str, dtype: str) -> dict[str, Any] | None:
    """One layout's calls, once; None where a process failed."""
    with tempfile.TemporaryDirectory(prefix="meshift-benchmark-") as folder:
        context = multiprocessing.get_context("spawn")
        given = [(rank, count, layout, model, dtype, folder) for rank in range(count)]
        gang = [context.Process(target=member, args=arguments) for arguments in given]
        for process in gang:
            process.start()
        for process in gang:
            process.join()
        if any(process.exitcode for process in gang):
            return None
        found: dict[str, Any] = json.loads((Path(folder) / "row.json").read_text(encoding="utf-8"))
        return found


def member(rank: int, count: int, layout: str, model: str, dtype: str, folder: str) -> None:
    """One process: every call once to warm up, and once to be timed; the first writes the row."""
    threads = max(1, (os.cpu_count() or 1) // count)
    torch.set_num_threads(threads)
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    devices = [Device(index=i) for i in range(count)]
    place = join(Placement.parse(f"0-{count - 1}", layout), devices[rank], {d: i for i, d in enumerate(devices)})
    assert place is not None
    whole = open_model(model, "lm", compute_dtype(dtype))
    vocab_size = whole.config.vocab_size
    role = LocalRole("actor", cut_for(whole, place), CONFIG, trainable=True, place=place if count > 1 else None)
    role.can_generate(NUM_ROWS, str)
    everybody = Peers(ranks=tuple(range(count)), index=rank, group=dist.group.WORLD if count > 1 else None)
    drawn = role.generate(SAMPLING, prompts(vocab_size)).batch
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: role.generate(SAMPLING, prompts(vocab_size)),
        "infer": lambda: role.infer(READING, drawn),
        "train": lambda: role.trainer.train(TASK, learned(drawn), rate=1e-6, seed=0),
    }
    row: dict[str, Any] = {"processes": count, "threads": threads}
    for name in CALLS:
        calls[name]()
        row[name] = timed(name, calls[name], everybody)
    if rank == 0:
        (Path(folder) / "row.json").write_text(json.dumps(row), encoding="utf-8")
    dist.destroy_process_group()


def timed(name: str, call: Callable[[], object], everybody: Peers) -> dict[str, float]:
    """Seconds of the slowest process, and the most memory of all processes together, in GB."""
    meter = PeakMeter(torch.device("cpu"))
    gather_facts(None, everybody)
    meter.begin(name)
    started = time.perf_counter()
    call()
    seconds = time.perf_counter() - started
    told = gather_facts([seconds, meter.end().get(f"{PREFIX}{name}", 0.0)], everybody)
    return {"seconds": max(one for one, _ in told), "peak_gb_in_all": sum(peak for _, peak in told)}


def prompts(vocab_size: int) -> Batch:
    """Prompts of one length and no words."""
    ids = torch.arange(NUM_ROWS * PROMPT) * 7919 % vocab_size
    rows = Ragged(ids, torch.full((NUM_ROWS,), PROMPT))
    return Batch({"prompts": rows, "index": Ragged.scalars(list(range(NUM_ROWS)), torch.int64)})


def learned(drawn: Batch) -> Batch:
    """Completions with an advantage for each token, half of them negative."""
    logprobs = drawn["logprobs"]
    advantages = Ragged(torch.linspace(-1, 1, len(logprobs.values)), logprobs.lengths)
    return drawn.union(Batch({"advantages": advantages}))


if __name__ == "__main__":
    raise SystemExit(main())
