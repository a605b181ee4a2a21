"""The reward function `unit_tests`: the programs in completions are run on their problems' tests, in the sandbox.

It has TRL's signature. It knows nothing of training, nor of how the sandbox is built.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import ConfigError
from meshift.rewards.code.extraction import complete_function, extract_code, import_names
from meshift.rewards.code.judging import Judge, Verdict
from meshift.rewards.code.problems import COLUMNS, Problem, form_of, read_problem
from meshift.rewards.sandbox.pool import Sandbox
from meshift.rewards.sandbox.probes import probe
from meshift.rewards.sandbox.slot import Slot
from meshift.rewards.signatures import RESERVED_ARGUMENTS

logger = logging.getLogger(__name__)
NUM_SHARED_PROGRAMS = 2  # the program that tests and the one that is tested, in one server's memory


class UnitTests:
    """A reward per completion. Making one tries the sandbox's layers; servers start at the first call.

    Raises `ConfigError` naming a layer that this machine does not have, unless `sandbox` is "unsafe".
    """

    waits = True  # for other processes: it is called in a thread, beside functions that compute here

    def __init__(self, config: UnitTestsConfig) -> None:
        self.config = config
        for folder in config.packages:
            if not os.path.isdir(folder):
                raise ConfigError(f"unit_tests is given packages in {folder!r}, where there is no folder")
        self.protection = probe()
        if config.sandbox == "strict":
            self.protection.require_all()
        elif self.protection.missing:
            logger.warning(f"generated programs run with less protection: {self.protection.describe()}")
        memory_bytes = config.memory_mb * 2**20
        self._judge = Judge(
            layers=self.protection.layers,
            timeout_s=config.timeout_s,
            total_timeout_s=config.total_timeout_s,
            memory_bytes=memory_bytes,
            output_bytes=config.output_kb * 2**10,
            stop_early=config.credit == "all",
        )
        self._sandbox = Sandbox(
            self.protection,
            NUM_SHARED_PROGRAMS * memory_bytes,
            config.num_workers,
            [os.path.abspath(folder) for folder in config.packages],
        )

    def describe(self) -> str:
        """For a dry run: the wall and the layers that programs run behind."""
        return f"in {self.protection.describe()}"

    def check_columns(self, columns: Sequence[str]) -> None:
        """Raise `ConfigError` where the data has tests in none of the known columns."""
        if form_of(columns) is None:
            forms = "; ".join(f"{form}: {', '.join(names)}" for form, names in COLUMNS.items())
            raise ConfigError(
                f"reward function unit_tests finds tests in none of the data's columns "
                f"({', '.join(sorted(set(columns) - {'prompt'})) or 'none besides prompt'}); it knows {forms}"
            )

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        log_metric: Callable[[str, Any], None],
        **columns: Any,
    ) -> list[float | None]:
        """1 or 0, or the part of the tests that pass; None where a problem has no tests.

        Raises `ProblemError` for a row whose tests cannot be read, `SandboxError` where the sandbox itself fails.
        """
        names = [name for name in columns if name not in RESERVED_ARGUMENTS]
        work = []
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: columns[name][index] for name in names}
            problem = read_problem(row, prompt, self.config.max_tests)
            work.append((problem, program_of(problem, _text(completion))))
        verdicts = self._sandbox.map(self._verdict, work)
        for name, values in _metrics(verdicts, all_run=self.config.credit == "partial").items():
            log_metric(name, values)
        return [self._reward(verdict) for verdict in verdicts]

    def _verdict(self, slot: Slot, work: tuple[Problem, str]) -> Verdict:
        return self._judge.judge(slot, *work)

    def _reward(self, verdict: Verdict) -> float | None:
        if not verdict.num_tests:
            return None
        if self.config.credit == "partial":
            return verdict.num_passed / verdict.num_tests
        return float(verdict.passed)


def program_of(problem: Problem, completion: str, *, cut: bool = True) -> str:
    """The program in a completion, with what the problem begins it with; `cut` is `complete_function`'s."""
    if problem.opening:
        return complete_function(problem.opening, problem.entry_point, completion, cut=cut)
    code = extract_code(completion, [problem.entry_point] if problem.entry_point else problem.remote)
    return import_names(problem.imports, code) + code


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _metrics(verdicts: Sequence[Verdict], *, all_run: bool) -> dict[str, list[float]]:
    """Numbers per completion, which the run averages; how many tests pass is known where all are run."""
    tested = [verdict for verdict in verdicts if verdict.num_tests]
    passed = [verdict.num_passed / verdict.num_tests for verdict in tested]
    return {
        "solved": [float(verdict.passed) for verdict in tested],
        **({"tests_passed": passed} if all_run else {}),
        "tests_run": [float(verdict.num_run) for verdict in tested],
        "tests_too_slow": [float(verdict.num_timeouts) for verdict in tested],
        "without_tests": [float(not verdict.num_tests) for verdict in verdicts],
    }
