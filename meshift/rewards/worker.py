"""A reward function in a process of its own, which can be killed when it takes too long, and started anew.

It knows nothing of what the function computes. The process loads the function itself, by its name: nothing but
JSON goes through the pipes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import IO, Any

import torch

from meshift.rewards.calling import MAX_CONCURRENT, timed_out
from meshift.rewards.scores import TIMEOUT, CallError, Fault, Scores
from meshift.rewards.signatures import Signature

STARTUP_S = 300.0  # to start Python and import the function's module, which may import much
GRACE_S = 1.0  # in which an async function's process reports a timeout itself, before it is killed
MAX_TIMEOUTS = 5  # of one function in one step; after them the step's other samples are not tried


class WorkerProcess:
    """Asks a process that is started when first needed. Not for several threads at once."""

    def __init__(self, spec: str, timeout_s: float) -> None:
        self.spec = spec
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """The answer. Raises `CallError` where it does not come within `limit_s`, or the process ends instead."""
        try:
            line = json.dumps(request)
        except (TypeError, ValueError) as error:
            what = f"has a timeout_s, and so a process of its own, which its arguments cannot reach ({error}),"
            raise CallError(Fault(what, "json")) from None
        if self._process is None:
            self._start()
        self._send(line)
        answer = self._receive(limit_s)
        if answer is None:
            self.close()
            raise CallError(timed_out(self.timeout_s))
        if "code" in answer:
            self.close()
            raise CallError(Fault(f"ended its process with exit code {answer['code']}", "exit"))
        return answer

    @property
    def is_running(self) -> bool:
        """Whether the next question needs no new process."""
        return self._process is not None

    def close(self) -> None:
        """End the process and what it has started; another `ask` starts a new one."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = None

    def _start(self) -> None:
        search = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "meshift.rewards.worker_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": search},
            encoding="utf-8",
            start_new_session=True,  # killed with all that it starts
        )
        self._finalizer = weakref.finalize(self, _kill, self._process)
        self._lines = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._lines), daemon=True).start()
        self._send(json.dumps({"spec": self.spec, "timeout_s": self.timeout_s}))
        answer = self._receive(STARTUP_S)
        if answer is None or "ready" not in answer:
            self.close()
            why = f"did not within {STARTUP_S:g} s" if answer is None else answer.get("refused", answer)
            what = f"could not be loaded in a process of its own, which a timeout_s takes ({why}),"
            raise CallError(Fault(what, "load"), can_locate=False)

    def _send(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: seen where its answer is awaited
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _receive(self, limit_s: float) -> dict[str, Any] | None:
        """The next answer, `{"code": exit code}` where the process has ended, or None where nothing comes."""
        assert self._process is not None
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            return None
        return dict(json.loads(line)) if line else {"code": self._process.wait()}


def _read(answers: IO[str], lines: queue.SimpleQueue[str]) -> None:
    with contextlib.suppress(ValueError):  # the pipe was closed
        for line in answers:
            lines.put(line)
    lines.put("")


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()


class ProcessInvoker:
    """Like `Invoker`, in a process of its own, with `timeout_s` for each call of the batch, or of a sample."""

    def __init__(self, spec: str, signature: Signature, timeout_s: float) -> None:
        self.signature = signature
        self.timeout_s = timeout_s
        self.worker = WorkerProcess(spec, timeout_s)

    def __call__(
        self, calls: Sequence[Mapping[str, Any]], num_samples: int, *, first_only: bool = False
    ) -> Scores:
        """See `Invoker`."""
        if self.signature.per_sample and not self.signature.is_async:
            return self._one_by_one(calls, first_only)
        limit_s = self.timeout_s
        if self.signature.is_async:
            rounds = math.ceil(num_samples / MAX_CONCURRENT) if self.signature.per_sample else 1
            limit_s = rounds * self.timeout_s + GRACE_S
        return self._ask(calls, num_samples, limit_s)

    def _ask(self, calls: Sequence[Mapping[str, Any]], num_samples: int, limit_s: float, index: int = 0) -> Scores:
        # The run starts torch's generator anew at each step; the process's start from the same seed.
        seed = (torch.initial_seed() + index) % 2**63
        answer = self.worker.ask({"calls": list(calls), "num_samples": num_samples, "seed": seed}, limit_s)
        if "scores" not in answer:
            raise CallError(Fault(answer["what"], answer["kind"]))
        return Scores.from_json(answer["scores"])

    def _one_by_one(self, calls: Sequence[Mapping[str, Any]], first_only: bool) -> Scores:
        """A request per sample, so that it is known which one is running."""
        values: list[float | None] = [None] * len(calls)
        faults: dict[int, Fault] = {}
        extras: dict[str, list[float]] = {}
        for index, call in enumerate(calls):
            one = self._attempt(call, index, faults)
            values[index] = one.values[0]
            for fault in one.faults.values():
                faults[index] = fault
            for key, numbers in one.extras.items():
                extras.setdefault(key, []).extend(numbers)
            if first_only and faults:
                break
        return Scores(values=values, faults=faults, extras=extras)

    def _attempt(self, call: Mapping[str, Any], index: int, faults: Mapping[int, Fault]) -> Scores:
        if num_timeouts(faults) >= MAX_TIMEOUTS:
            return Scores.all_failed(1, NOT_TRIED, of_batch=False)
        try:
            return self._ask([call], 1, self.timeout_s, index)
        except CallError as failure:
            if not failure.can_locate:
                raise
            return Scores.all_failed(1, failure.fault, of_batch=False)


NOT_TRIED = Fault(f"was not called, after {MAX_TIMEOUTS} timeouts in this step,", "not tried")


def num_timeouts(faults: Mapping[int, Fault]) -> int:
    """How many of the faults are timeouts."""
    return sum(fault.kind == TIMEOUT for fault in faults.values())
