"""`meshift profile`: measure the device that runs would use, so that `meshift plan` predicts by it.

It knows nothing of what is measured, or how.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from meshift.cli.command import Command, UsageError
from meshift.cli.progress import RichObserver
from meshift.cli.tables import print_rows
from meshift.counted import heard_by
from meshift.planner.hardware import Hardware
from meshift.planner.workload import WIDTHS

MOST_PROCESSES = 16


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="NAME", help="folder, `pypi:` name or hub id whose layers are run (default: a stand-in)"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=sorted(WIDTHS),
        help="compute type, may be given twice (default: what `dtype: auto` is here)",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", default=4, help="beside each other, on a CPU: up to so many (4)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, about a minute")
    parser.add_argument("--out", metavar="FILE", default="profile.json", help="where to write it (profile.json)")


def _run(args: argparse.Namespace) -> int:
    if not 1 <= args.processes <= MOST_PROCESSES:
        raise UsageError(f"--processes {args.processes}: give 1 to {MOST_PROCESSES}")
    if Path(args.out).suffix != ".json":
        raise UsageError(f"--out {args.out}: `meshift plan --hardware` reads files whose name ends in .json")
    from meshift.models.hf.load import load_config
    from meshift.runtime.models import compute_dtype, model_folder
    from meshift.runtime.profiling.models import QUICK, THOROUGH
    from meshift.runtime.profiling.profile import Asked, measure, write

    config = None if args.model is None else load_config(model_folder(args.model))
    dtypes = tuple(dict.fromkeys(args.dtype or [str(compute_dtype("auto")).removeprefix("torch.")]))
    effort = QUICK if args.quick else THOROUGH
    asked = Asked(
        config=config, model=args.model or "", dtypes=dtypes, num_processes=args.processes, effort=effort
    )
    started = time.perf_counter()
    with RichObserver() as observer, heard_by(observer.on_count):
        hardware = measure(asked, observer)
    write(hardware, Path(args.out))
    print_rows(f"{hardware.name}, measured in {time.perf_counter() - started:.0f} s", _rows(hardware, args.out))
    return 0


def _rows(hardware: Hardware, out: str) -> list[tuple[str, str]]:
    """What was found, in brief."""
    profile = hardware.profile
    assert profile is not None
    rows = [
        (f"products in {dtype}", f"up to {rate / 1e9:.3g} GFLOP/s of a process")
        for dtype, rate in hardware.flops.items()
        if rate > 0
    ]
    rows.append(("memory", f"{hardware.memory_rate / 1e9:.3g} GB/s, read and written"))
    if profile.messages:
        rows.append(
            ("messages", f"{hardware.near_rate / 1e9:.3g} GB/s, {1e6 * hardware.near_delay:.0f} microseconds each")
        )
    for kind, found in profile.crowding.items():
        most = max(found, key=int)
        rows.append((f"{kind} in {most} processes", f"{found[most]:.2f} times as long as in one"))
    if profile.is_disturbed:
        rows.append(("note", f"other work took {profile.others:.1f} processors: measure again when it has ended"))
    return [*rows, ("profile", out), ("use it", f"meshift plan --config run.yaml --devices N --hardware {out}")]


PROFILE = Command(
    name="profile",
    summary="measure this machine's device, for predictions by `meshift plan`",
    description=(
        "Measure what the planner predicts by, on the device that a run would use: a model's layers forward and\n"
        "backward, decoding, prompts, the head, the optimizer, memory, and on a CPU messages between processes\n"
        "and what they cost each other on shared processors. Three minutes; nothing else should run meanwhile."
    ),
    example="meshift profile --model pypi:smollm2-135m-instruct --out profile.json",
    configure=_configure,
    run=_run,
)
