"""The near side of a contestant: a long-lived process that is asked for one round at a time.

It knows the protocol of `serve.py` and what the rest of the machine did during a round, and nothing of the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from benchmarks.machine import cpu_seconds, cpu_times, peak_memory_gb, process_tree
from meshift.errors import MeshiftError

ROOT = Path(__file__).resolve().parents[1]


class ContestantError(MeshiftError):
    """One side could not do its work: it ended, or it said why."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One timed round. `others` and `stolen` are processors, on average: taken by other processes, or withheld
    by the hypervisor; a round with much of either is noisy."""

    seconds: float
    num_tokens: int
    others: float
    stolen: float
    extra: Mapping[str, Any] = field(default_factory=dict)


class Contestant:
    """A process of `python -m <module>`; `start` it with options, ask for rounds, `close` it."""

    def __init__(
        self, name: str, command: Sequence[str], *, num_threads: int, log: Path, device: str = "cpu"
    ) -> None:
        self.name = name
        self.log = log
        self._errors: IO[str] = log.open("a", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, **variables(num_threads, device), "PYTHONPATH": str(ROOT)},
        )
        self.about: Mapping[str, Any] = {}
        self._device_memory_gb = 0.0

    def start(self, **options: Any) -> Self:
        """Have it load models and data. Raises `ContestantError` where it cannot."""
        reply, others, stolen = self._watched({"verb": "start", **options})
        self.about = {**reply, "others": others, "stolen": stolen}
        return self

    def round(self, **options: Any) -> Round:
        """Have it work once, and note what other processes took meanwhile."""
        reply, others, stolen = self._watched({"verb": "round", **options})
        return Round(
            seconds=float(reply.pop("seconds")),
            num_tokens=int(reply.pop("num_tokens")),
            others=others,
            stolen=stolen,
            extra=reply,
        )

    def _watched(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], float, float]:
        """The reply, and the processors that others took and that were withheld meanwhile."""
        watched = [os.getpid(), *process_tree(self._process.pid)]
        before, own, started = cpu_times(), cpu_seconds(watched), time.perf_counter()
        reply = dict(self._ask(request))
        span = max(time.perf_counter() - started, 1e-9)
        after, own_after = cpu_times(), cpu_seconds(watched)
        taken = max(0.0, after.busy - before.busy - (own_after - own))
        return reply, round(taken / span, 3), round((after.stolen - before.stolen) / span, 3)

    def peak_memory_gb(self) -> float:
        """The accelerator's peak where there is one, else the largest resident memory of the process tree."""
        return self._device_memory_gb or peak_memory_gb(process_tree(self._process.pid))

    def close(self) -> None:
        """End it: it stops when its stdin does, and is killed where it does not."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _ask(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; reading says so
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            raise ContestantError(f"{self.name} ended with exit code {code}; its output is in {self.log}")
        reply: dict[str, Any] = json.loads(line)
        self._device_memory_gb = max(self._device_memory_gb, reply.pop("device_memory_gb", 0.0))
        if "error" in reply:
            raise ContestantError(f"{self.name}: {reply['error']}; its output is in {self.log}")
        return reply


def variables(num_threads: int, device: str) -> dict[str, str]:
    """What makes every library that we know of use so many threads, and no GPU where the CPU is measured."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    threads = dict.fromkeys(names, str(num_threads)) | {"BENCHMARK_THREADS": str(num_threads)}
    return threads | quiet | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
