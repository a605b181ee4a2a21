"""How many unit tests a second the sandbox runs, layer by layer, beside a plain process per test.

    python -m benchmarks.sandbox --json out.json

Programs are small, so that what is measured is the sandbox: one adds two numbers from stdin, one is a function
with three asserts. It judges every verdict, and fails on a wrong one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine
from meshift.rewards.code.judging import Judge
from meshift.rewards.code.problems import Problem
from meshift.rewards.sandbox.launching import best_wall
from meshift.rewards.sandbox.layers import LANDLOCK, LAYERS, LIMITS, PRIVILEGES, SECCOMP
from meshift.rewards.sandbox.pool import Sandbox
from meshift.rewards.sandbox.probes import Protection

NUM_INPUTS = 20
SUM = Problem(inputs=[(f"{i} {i * i}\n", f"{i + i * i}\n") for i in range(NUM_INPUTS)])
SUM_PROGRAM = "print(sum(map(int, input().split())))"
SQUARE = Problem(tests=[{"code": f"assert square({i}) == {i * i}"} for i in range(3)])
SQUARE_PROGRAM = "def square(x):\n    return x * x"
STEPS = {
    "only the wall": (),
    "and limits, privileges": (LIMITS, PRIVILEGES),
    "and seccomp, Landlock": (LIMITS, PRIVILEGES, LANDLOCK, SECCOMP),
    "and fresh namespaces: every layer": LAYERS,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the result as JSON and write it to a file if one is named."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.sandbox", description=__doc__.splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    made.add_argument("--seconds", type=float, default=2.0, help="of one round of one row (default: 2)")
    made.add_argument("--rounds", type=int, default=3, help="rounds, whose median counts (default: 3)")
    made.add_argument("--workers", type=int, default=2, help="programs at the same time (default: 2)")
    given = made.parse_args(arguments)
    rounds = [list(_round(given.workers, given.seconds)) for _ in range(given.rounds)]
    result = {"machine": machine.describe(), "workers": given.workers, "rows": _medians(rounds)}
    text = json.dumps(result, indent=1)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


def _round(workers: int, seconds: float) -> Any:
    """(what, wall, tests per second) of every row, one after another."""
    yield "a plain process per test", "none", _rate(_plain, workers, seconds, 1)
    walls = dict.fromkeys((best_wall(), "own"))
    for wall in walls:
        for what, layers in STEPS.items():
            if wall == best_wall() or layers == LAYERS:
                yield f"stdin, {what}", wall, _sandboxed(wall, layers, SUM, SUM_PROGRAM, workers, seconds)
    yield (
        "asserts, every layer",
        best_wall(),
        _sandboxed(best_wall(), LAYERS, SQUARE, SQUARE_PROGRAM, workers, seconds),
    )


def _medians(rounds: Sequence[Sequence[tuple[str, str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for same in zip(*rounds, strict=True):
        rates = [rate for _, _, rate in same]
        rows.append(
            {
                "what": same[0][0],
                "wall": same[0][1],
                "tests_per_s": round(median(rates), 1),
                "lowest": round(min(rates), 1),
                "highest": round(max(rates), 1),
            }
        )
    return rows


def _plain() -> None:
    """What most scorers do: a new interpreter for each test."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", SUM_PROGRAM], input="1 2\n", capture_output=True, text=True, check=True
    )
    assert done.stdout == "3\n"


def _rate(one: Callable[[], object], workers: int, seconds: float, tests_each: int) -> float:
    """Tests per second of `workers` threads that call `one` again and again."""
    end = time.perf_counter() + seconds

    def work(_: int) -> int:
        count = 0
        while time.perf_counter() < end:
            one()
            count += tests_each
        return count

    with ThreadPoolExecutor(workers) as threads:
        started = time.perf_counter()
        return sum(threads.map(work, range(workers))) / (time.perf_counter() - started)


def _sandboxed(
    wall: Any, layers: Sequence[str], problem: Problem, program: str, workers: int, seconds: float
) -> float:
    protection = Protection(wall=wall, layers=tuple(layers), missing={})
    sandbox = Sandbox(protection, 2**30, workers)
    judge = Judge(layers=tuple(layers))
    try:
        sandbox.map(lambda slot, _: slot.start(), range(workers))

        def work(slot: Any, end: float) -> int:
            count = 0
            while time.perf_counter() < end:
                verdict = judge.judge(slot, problem, program)
                if not verdict.passed:
                    raise AssertionError(f"a right program did not pass: {verdict}")
                count += len(problem)
            return count

        started = time.perf_counter()
        counts = sandbox.map(work, [started + seconds] * workers)
        return sum(counts) / (time.perf_counter() - started)
    finally:
        sandbox.close()


if __name__ == "__main__":
    sys.exit(main())
