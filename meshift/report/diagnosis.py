"""What a rule says of a run: a severity, a few words, and a sentence with figures and what to do.

It knows no rule; `rl_rules.py`, `fit_rules.py` and `health_rules.py` hold them, `verdicts.py` asks them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from meshift.report.run_data import RunData
from meshift.report.series import Series

Severity = Literal["warning", "notice", "good"]
MIN_STEPS = 8
"""Fewer values than this show no trend, so no rule speaks of one."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """`rule` is the name that the documentation lists; `metrics` are the curves that show it."""

    rule: str
    severity: Severity
    title: str
    text: str
    metrics: tuple[str, ...] = ()


def say(rule: str, severity: Severity, title: str, text: str, *metrics: str) -> Diagnosis:
    """A diagnosis; `metrics` are the curves that show it."""
    return Diagnosis(rule=rule, severity=severity, title=title, text=text, metrics=metrics)


Rule = Callable[[RunData], Diagnosis | None]


def long_enough(series: Series) -> bool:
    """Whether the series has a beginning and an end to compare."""
    return series.finite.size >= MIN_STEPS


def step_list(steps: list[int]) -> str:
    """`step 4`, `steps 4, 9 and 12`, `50 steps, the first at 4`."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    if len(steps) > 4:
        return f"{len(steps)} steps, the first of them {steps[0]}"
    return f"steps {', '.join(map(str, steps[:-1]))} and {steps[-1]}"
