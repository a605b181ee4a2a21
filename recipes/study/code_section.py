"""The report's section on code, and its finding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from meshift.report.document import number_table, section
from meshift.report.markup import Markup, element
from recipes.study.code import rates
from recipes.study.findings import Finding, direction, in_words
from recipes.study.intervals import difference, share_of
from recipes.study.setting import CodeSetting


def code_findings(setting: CodeSetting, result: Mapping[str, Any]) -> list[Finding]:
    """pass@k after less before, problem by problem."""
    found = []
    for k in setting.ks:
        before, after = (rates(result[when], k) for when in ("before", "after"))
        gain = difference(after, before)
        figures = (
            f"{in_words(share_of(before))} before, {in_words(share_of(after))} after; difference {in_words(gain)}"
        )
        found.append(
            Finding(claim=f"Code: PPO with unit tests raises pass@{k}", figures=figures, verdict=direction(gain))
        )
    return found


def code_section(setting: CodeSetting, result: Mapping[str, Any]) -> Markup:
    """What was run, and pass@k before and after."""
    words = (
        f"SmolLM2-135M-Instruct on MBPP: judged on the first {setting.num_heldout} problems, "
        f"{setting.num_samples} samples of at most {setting.completion_length} tokens at temperature "
        f"{setting.temperature:g}; trained by PPO on the {setting.num_train} problems behind them "
        f"({', '.join(setting.overrides)}), with 10 where all tests pass and 0 else. Intervals: 95 %, over "
        "problems; one training seed."
    )
    rows = [
        [f"pass@{k}", *(in_words(share_of(rates(result[when], k))) for when in ("before", "after"))]
        for k in setting.ks
    ]
    return section(
        "Code",
        element("p", words, class_="hint"),
        number_table(["", "before", "after"], rows),
        anchor="code",
    )
