"""Which tests generated programs pass, and what they print: the small interface, and the sandbox behind it.

It knows nothing of files, models or estimates. Nothing is run outside of the sandbox.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import ConfigError
from meshift.evaluation.progress import Progress
from meshift.rewards.code.judging import Judge, Verdict
from meshift.rewards.code.problems import Problem, form_of, read_problem
from meshift.rewards.sandbox.pool import Sandbox
from meshift.rewards.sandbox.probes import probe
from meshift.rewards.sandbox.slot import Slot

NUM_CLUSTER_INPUTS = 20  # that programs are told apart by
PRIVATE = ("private_tests", "generated_tests")
Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


class ProgramTests(Protocol):
    """Runs programs somewhere they can do no harm. Equal work is done once."""

    def verdicts(self, work: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Of each program on its problem's tests."""

    def outputs(self, work: Sequence[tuple[Problem, str]], inputs: Sequence[Sequence[str]]) -> list[list[str]]:
        """What each program prints for each of its inputs."""


@dataclass(frozen=True, kw_only=True)
class CodeProblem:
    """A problem's tests: all, those that are public, and inputs that programs are told apart by."""

    whole: Problem
    public: Problem
    inputs: tuple[str, ...]


def read_code_problem(row: Mapping[str, Any], num_public: int | None) -> CodeProblem:
    """From a row of a benchmark. Public are the first `num_public` tests, or those that CodeContests calls so.

    Inputs are those of CodeContests' `generated_tests`, whose outputs are not looked at, or else of the public
    tests; there are none for tests of functions.
    """
    prompt = row.get("prompt", "")
    whole = read_problem(row, prompt)
    if num_public is not None:
        public = read_problem(row, prompt, max_tests=num_public)
    elif form_of([name for name, value in row.items() if value is not None]) == "CodeContests":
        none: dict[str, list[str]] = {"input": [], "output": []}
        others = {name: value for name, value in row.items() if name not in PRIVATE}
        public = read_problem({**others, "public_tests": row.get("public_tests") or none}, prompt)
    else:
        public = Problem()
    generated = row.get("generated_tests")
    source = read_problem({"generated_tests": generated}, "") if generated else public
    inputs = tuple(given for given, _ in source.inputs[:NUM_CLUSTER_INPUTS])
    return CodeProblem(whole=whole, public=public, inputs=inputs)


class SandboxedTests:
    """`ProgramTests` in the sandbox of the reward function `unit_tests`.

    Raises `ConfigError` naming a layer of it that this machine does not have, unless `sandbox` is "unsafe": then
    `notes` says so.
    """

    def __init__(self, config: UnitTestsConfig, on_progress: Progress | None = None) -> None:
        self._on_progress = on_progress
        found = probe()
        if config.sandbox == "strict":
            try:
                found.require_all()
            except ConfigError as error:
                raise ConfigError(
                    str(error).replace("sandbox: unsafe in its kwargs", "--sandbox unsafe")
                ) from None
        less = f"generated programs run with less protection: {found.describe()}"
        self.notes = [less] if found.missing else []
        self._judge = Judge(
            layers=found.layers,
            timeout_s=config.timeout_s,
            total_timeout_s=config.total_timeout_s,
            memory_bytes=config.memory_mb * 2**20,
            output_bytes=config.output_kb * 2**10,
            stop_early=config.credit == "all",
        )
        self._sandbox = Sandbox(found, 2 * config.memory_mb * 2**20, config.num_workers)

    def verdicts(self, work: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """See `ProgramTests`. A problem without tests has the verdict of none run."""
        keys = [(id(problem), program) for problem, program in work]
        return self._once("programs tested", keys, lambda slot, i: self._judge.judge(slot, *work[i]))

    def outputs(self, work: Sequence[tuple[Problem, str]], inputs: Sequence[Sequence[str]]) -> list[list[str]]:
        """See `ProgramTests`."""
        keys = [(id(problem), program) for problem, program in work]
        return self._once(
            "programs told apart", keys, lambda slot, i: self._judge.outputs(slot, *work[i], inputs[i])
        )

    def close(self) -> None:
        """End the sandbox's servers."""
        self._sandbox.close()

    def _once(self, what: str, keys: Sequence[Item], run: Callable[[Slot, int], Result]) -> list[Result]:
        """`run(slot, i)` for the first i of each key, in as many slots as there are; the result for every key."""
        firsts: dict[Item, int] = {}
        for i, key in enumerate(keys):
            firsts.setdefault(key, i)
        lock, done = threading.Lock(), 0

        def counted(slot: Slot, i: int) -> Result:
            nonlocal done
            result = run(slot, i)
            with lock:
                done += 1
                if self._on_progress is not None:
                    self._on_progress(what, done, len(firsts))
            return result

        found = dict(zip(firsts, self._sandbox.map(counted, list(firsts.values())), strict=True))
        return [found[key] for key in keys]
