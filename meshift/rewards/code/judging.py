"""Whether a program passes a problem's tests: its outputs are compared on this side, or in a process of its own
where no line of the program runs.

It knows nothing of rewards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshift.rewards.code.problems import Problem
from meshift.rewards.sandbox.comparing import same_output
from meshift.rewards.sandbox.layers import Limits
from meshift.rewards.sandbox.slot import Ended, MemoryFile, Process, Slot
from meshift.rewards.sandbox.tester import TOO_LONG
from meshift.rewards.sandbox.values import encode

VERDICT_BYTES = 2**20
ERROR_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How many of `num_tests` passed, how many were run, and what was wrong with the first that did not."""

    num_tests: int
    num_passed: int = 0
    num_run: int = 0
    num_timeouts: int = 0
    wrong: str = ""

    @property
    def passed(self) -> bool:
        """All of at least one test."""
        return 0 < self.num_tests == self.num_passed


@dataclass(kw_only=True)
class _Results:
    """Verdicts as they come in, by test."""

    passed: dict[int, bool] = field(default_factory=dict)
    num_timeouts: int = 0
    wrong: str = ""

    def add(self, test: int, wrong: str | None, *, timeout: bool = False) -> None:
        self.passed.setdefault(test, wrong is None)
        self.num_timeouts += timeout
        self.wrong = self.wrong or (wrong and f"test {test}: {wrong}") or ""

    def verdict(self, num_tests: int) -> Verdict:
        return Verdict(
            num_tests=num_tests,
            num_passed=sum(self.passed.values()),
            num_run=len(self.passed),
            num_timeouts=self.num_timeouts,
            wrong=self.wrong,
        )


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """A program that was run on one input."""

    ended: Ended
    text: str
    stderr: str

    @property
    def failed(self) -> str:
        """Why it did not end well, or an empty text."""
        if self.ended.stopped == "server":
            return "took the sandbox's server with it"
        if self.ended.stopped is not None:
            return TOO_LONG
        if self.ended.status != 0:
            lines = self.stderr.strip().splitlines()
            return f"ended with {lines[-1][:200]}" if lines else f"ended with status {self.ended.status}"
        return ""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Runs programs within limits. `timeout_s` of processor time a test, by the clock twice that and a second; of
    a problem with a limit of its own, that one if it is lower. `stop_early`: one failed test decides."""

    layers: Sequence[str]
    timeout_s: float = 4.0
    total_timeout_s: float = 30.0
    memory_bytes: int = 512 * 2**20
    output_bytes: int = 2**20
    stop_early: bool = False

    def judge(self, slot: Slot, problem: Problem, program: str) -> Verdict:
        """Run a program's tests. Raises `SandboxError` where the sandbox fails, never for what the program
        does."""
        results = _Results()
        deadline = time.monotonic() + self.total_timeout_s
        with MemoryFile(program.encode(errors="replace")) as code:
            if problem.inputs:
                self._judge_outputs(slot, problem, code, results, deadline)
            else:
                self._judge_functions(slot, problem, code, results, deadline)
        return results.verdict(len(problem))

    def _limits(self, problem: Problem, deadline: float, num_tests: int = 1) -> Limits:
        cpu_s = num_tests * min(self.timeout_s, problem.time_limit_s or self.timeout_s)
        wall_s = min(2 * cpu_s + 1, max(0.001, deadline - time.monotonic()))
        memory = min(self.memory_bytes, problem.memory_limit_bytes or self.memory_bytes)
        return Limits(cpu_s=cpu_s, wall_s=wall_s, memory_bytes=memory, output_bytes=self.output_bytes)

    def outputs(self, slot: Slot, problem: Problem, program: str, inputs: Sequence[str]) -> list[str]:
        """What a program prints for each of these inputs, within the problem's limits; "!" and why for one that it
        does not end well on. Raises `SandboxError` where the sandbox fails."""
        found: list[str] = []
        deadline = time.monotonic() + self.total_timeout_s
        with MemoryFile(program.encode(errors="replace")) as code:
            for given in inputs:
                if time.monotonic() >= deadline:
                    return [*found, *["!no time was left"] * (len(inputs) - len(found))]
                ran = self._run_program(slot, problem, code, given, deadline)
                found.append(f"!{ran.failed}" if ran.failed else ran.text)
        return found

    def _judge_outputs(
        self, slot: Slot, problem: Problem, code: MemoryFile, results: _Results, deadline: float
    ) -> None:
        for test, (given, expected) in enumerate(problem.inputs):
            if time.monotonic() >= deadline:
                results.wrong = results.wrong or f"test {test}: no time was left"
                return
            ran = self._run_program(slot, problem, code, given, deadline)
            wrong = _wrong_output(ran, expected, contest=problem.contest)
            results.add(test, wrong, timeout=wrong == TOO_LONG)
            if self.stop_early and wrong is not None:
                return

    def _run_program(self, slot: Slot, problem: Problem, code: MemoryFile, given: str, deadline: float) -> _Ran:
        limits = self._limits(problem, deadline)
        with (
            MemoryFile(given.encode(errors="replace")) as stdin,
            MemoryFile() as stdout,
            MemoryFile() as stderr,
        ):
            files = {"code": code.place, "stdin": stdin.place, "stdout": stdout.place, "stderr": stderr.place}
            process = Process(kind="program", files=files, limits=limits, layers=self.layers)
            [ended] = slot.run([process])
            text = stdout.read(self.output_bytes + 1).decode(errors="replace")
            return _Ran(ended=ended, text=text, stderr=stderr.read(ERROR_BYTES).decode(errors="replace"))

    def _judge_functions(
        self, slot: Slot, problem: Problem, code: MemoryFile, results: _Results, deadline: float
    ) -> None:
        """In rounds: where a test ends the program or takes too long, the next ones get it fresh."""
        left = [dict(test, test=i) for i, test in enumerate(problem.tests)]
        while left and time.monotonic() < deadline:
            limits = self._limits(problem, deadline, len(left))
            lines, ended = self._round(slot, problem, code, left, limits)
            stopped = any(one.stopped not in (None, "server") for one in ended)
            blamed = TOO_LONG if stopped else "ended"
            fatal = blamed if not lines else next((str(line["fatal"]) for line in lines if "fatal" in line), None)
            if fatal is not None:  # it did not load, and would not for the other tests either
                for test in left:
                    results.add(test["test"], fatal, timeout=fatal == TOO_LONG)
                return
            for line in lines:
                if "test" in line:
                    wrong = None if line["passed"] is True else str(line["detail"])
                    results.add(int(line["test"]), wrong, timeout=wrong == TOO_LONG)
            before = len(left)
            left = [test for test in left if test["test"] not in results.passed]
            if len(left) == before:  # no verdict at all: the first test is to blame
                results.add(left[0]["test"], blamed, timeout=stopped)
                left = left[1:]
            if self.stop_early and not all(results.passed.values()):
                return
        if left:
            results.wrong = results.wrong or f"test {left[0]['test']}: no time was left"

    def _round(
        self, slot: Slot, problem: Problem, code: MemoryFile, tests: Sequence[Mapping[str, Any]], limits: Limits
    ) -> tuple[list[dict[str, Any]], list[Ended]]:
        """The tests' process and the program's, joined by two pipes; what the first of them wrote."""
        one = self._limits(problem, time.monotonic() + self.total_timeout_s)
        work = {
            "setup": problem.setup,
            "remote": list(problem.remote),
            "limit_s": one.wall_s,
            "tests": [_sent(test) for test in tests],
        }
        with MemoryFile(json.dumps(work).encode()) as given, MemoryFile() as written:
            testing = {"tests": given.place, "verdicts": written.place}
            generous = Limits(
                cpu_s=limits.cpu_s,
                wall_s=limits.wall_s,
                memory_bytes=self.memory_bytes,
                output_bytes=VERDICT_BYTES,
            )
            ended = slot.run(
                [
                    Process(kind="tests", files=testing, limits=generous, layers=self.layers),
                    Process(kind="functions", files={"code": code.place}, limits=limits, layers=self.layers),
                ],
                links=[(0, "ask", 1, "hear"), (1, "answer", 0, "hear")],
            )
            lines = written.read(VERDICT_BYTES).decode(errors="replace").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")], ended


def _sent(test: Mapping[str, Any]) -> dict[str, Any]:
    """A test as it goes to its process: JSON alone would make texts of a dictionary's numbers."""
    values = {name: encode(test[name], _refuse) for name in ("given", "expected") if name in test}
    return {**test, **values}


def _refuse(value: Any) -> dict[str, Any]:
    raise TypeError(f"a test has a value of type {type(value).__name__}")


def _wrong_output(ran: _Ran, expected: str, *, contest: bool) -> str | None:
    """None for the right output of a program that ended by itself. How it ended can only take a pass away."""
    if ran.failed:
        return ran.failed
    if same_output(ran.text, expected, contest=contest):
        return None
    return f"printed {ran.text[:80]!r} instead of {expected[:80]!r}"
