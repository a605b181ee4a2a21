"""The reward of the study's code part: tests of what `meshift eval --task mbpp` would take for the program."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from meshift.config.unit_tests import UnitTestsConfig
from meshift.evaluation.tasks import find_task
from meshift.rewards.code.unit_tests import UnitTests

TIMEOUT_S = 2


def solved(
    prompts: list[str], completions: list[str], log_metric: Callable[[str, Any], None], **columns: Any
) -> list[float | None]:
    """1 where all tests of a problem pass, else 0. The text is cut where MBPP's stop strings begin."""
    stops = find_task("mbpp").stop_strings
    return _tests()(prompts, [before(text, stops) for text in completions], log_metric, **columns)


def before(text: str, stops: tuple[str, ...]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


@cache
def _tests() -> UnitTests:
    """One sandbox for the whole run."""
    return UnitTests(UnitTestsConfig(credit="all", timeout_s=TIMEOUT_S))
