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
    """pass@k after PPO less that of what it started from, problem by problem."""
    found = []
    for k in setting.ks:
        shares = {stage: rates(counts, k) for stage, counts in result["stages"].items()}
        *_, start, end = shares.values()
        gain = difference(end, start)
        each = ", ".join(f"{in_words(share_of(share))} {stage}" for stage, share in shares.items())
        figures = f"{each}; difference that PPO made {in_words(gain)}"
        found.append(
            Finding(claim=f"Code: PPO with unit tests raises pass@{k}", figures=figures, verdict=direction(gain))
        )
    return found


def code_section(setting: CodeSetting, result: Mapping[str, Any]) -> Markup:
    """What was run, and pass@k of every stage."""
    tuned = "" if setting.sft is None else f"fine-tuned on the solutions ({', '.join(setting.sft)}), then "
    words = (
        f"{setting.model} on MBPP: judged on the first {setting.num_heldout} problems, "
        f"{setting.num_samples} samples of at most {setting.completion_length} tokens at temperature "
        f"{setting.temperature:g}; {tuned}trained by PPO on the {setting.num_train} problems behind them "
        f"({', '.join(setting.overrides)}), with 10 where all tests pass and 0 else. Intervals: 95 %, over "
        "problems; one training seed."
    )
    stages = result["stages"]
    rows = [
        [f"pass@{k}", *(in_words(share_of(rates(counts, k))) for counts in stages.values())] for k in setting.ks
    ]
    return section(
        "Code",
        element("p", words, class_="hint"),
        number_table(["", *stages], rows),
        anchor="code",
    )
