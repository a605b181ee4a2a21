"""`python -m benchmarks.single_device`: Meshift beside its peers on this machine, as a table and as JSON.

It reads the command line, draws progress and writes the file; `suite.py` does the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import machine, rows, works
from benchmarks.environments import default_root
from benchmarks.materials import prepare
from benchmarks.rows import Row
from benchmarks.suite import Settings, Suite
from benchmarks.works import Work
from meshift import __version__
from meshift.errors import ConfigError, MeshiftError
from meshift.kernels.cpu import who_multiplies

MIN_ROUNDS = 3


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.single_device", description=__doc__.splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here, after every work")
    made.add_argument(
        "--against", default=",".join(works.PEERS), metavar="PEERS", help="of %(default)s; '' is none"
    )
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--quick", action="store_true", help="about five minutes on two processors")
    made.add_argument("--only", default=",".join(works.GROUPS), metavar="GROUPS", help="of %(default)s")
    made.add_argument("--works", default="", metavar="TEXT", help="only works whose name contains this")
    made.add_argument(
        "--settings",
        choices=("all", "first"),
        default="all",
        help="of each peer: all that a user could choose, or the first, usually the best (default: all)",
    )
    made.add_argument("--rounds", type=int, default=MIN_ROUNDS, help="timed rounds of each side (default: 3)")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each side (default: all)")
    made.add_argument("--environments", type=Path, default=default_root(), help="default: %(default)s")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; 2 for wrong input, 1 where our own side failed."""
    given = parser().parse_args(arguments)
    console = Console(stderr=True)
    try:
        return run(given, console)
    except MeshiftError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return error.exit_code


def run(given: argparse.Namespace, console: Console) -> int:
    """Play every chosen work."""
    chosen = choose(given)
    with tempfile.TemporaryDirectory(prefix="meshift-benchmark-") as folder:
        settings = Settings(
            materials=prepare(Path(folder)),
            environments=given.environments,
            num_threads=given.threads,
            num_rounds=given.rounds,
            device=given.device,
        )
        found = play(chosen, settings, given, console)
    Console(width=None if sys.stdout.isatty() else 200).print(rows.table(found))
    return 0 if any(row.ours is not None for row in found) else 1


def choose(given: argparse.Namespace) -> list[Work]:
    """The works that the command line asks for. Raises `ConfigError` for what there is not."""
    peers = _named("--against", given.against, works.PEERS)
    groups = _named("--only", given.only, works.GROUPS)
    if given.rounds < MIN_ROUNDS:
        raise ConfigError(f"--rounds is {given.rounds}, and medians need at least {MIN_ROUNDS}; raise it")
    if not 1 <= given.threads <= (os.cpu_count() or 1):
        raise ConfigError(f"--threads is {given.threads}; give 1 to {os.cpu_count() or 1}, the processors here")
    if given.device == "cuda" and machine.accelerator() is None:
        raise ConfigError("--device is cuda, but nvidia-smi finds no GPU here; use --device cpu")
    if given.json is not None and not given.json.resolve().parent.is_dir():
        raise ConfigError(f"--json: there is no folder {given.json.resolve().parent}; make it first")
    listed = works.quick_works() if given.quick else works.all_works()
    listed = [work for work in listed if given.works in work.name]
    if not listed:
        raise ConfigError(f"--works: no work's name contains {given.works!r}; leave it out to see them all")
    if given.settings == "first":
        listed = [works.with_first_settings(work) for work in listed]
    return works.chosen(listed, groups, peers, given.device)


def _named(option: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise ConfigError(f"{option}: there is no {name!r}; give some of {', '.join(known)}")
    return names


def play(chosen: list[Work], settings: Settings, given: argparse.Namespace, console: Console) -> list[Row]:
    """All rows; the file is written anew after every work, so an interrupted run keeps what it has."""
    found: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        total = sum(map(weight, chosen))
        task = bars.add_task("starting", total=total)
        suite = Suite(settings, say=lambda text: bars.update(task, description=text))
        suite.measure(sorted({work.batch for work in chosen if work.group in ("generation", "rl")}))
        for work in chosen:
            found += suite.play(work)
            bars.advance(task, weight(work))
            if given.json is not None:
                write(given.json, report(suite, given, found))
    return found


def weight(work: Work) -> float:
    """A work's share of the progress bar: its rounds, over all settings of all peers."""
    return work.expected_seconds * max(1, sum(len(peer.variants) for peer in work.peers))


def report(suite: Suite, given: argparse.Namespace, found: Iterable[Row]) -> dict[str, Any]:
    """All that a reader needs to judge the figures."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "device": given.device,
        "num_threads": given.threads,
        "quick": given.quick,
        "works": given.works,
        "settings": given.settings,
        "rounds": given.rounds,
        "versions": {"meshift": __version__}
        | {name: metadata.version(name) for name in ("torch", "transformers")},
        "cpu_kernels": who_multiplies(),
        "limits": dict(suite.measured),
        "agreement": dict(suite.agreement),
        "rows": [row.as_json() for row in found],
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
