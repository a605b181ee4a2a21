"""The study's report: findings first, then each part's pictures and tables, then how it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from meshift.report.document import document, key_values, section
from meshift.report.markup import Child, Markup, element
from meshift.report.numbers import duration
from meshift.report.run_page import header
from recipes.study.findings import Finding, ablation_findings, sentiment_findings, theory_findings
from recipes.study.sentiment_sections import ablated_of, ablation_section, frontier_section, places_of
from recipes.study.setting import StudySetting
from recipes.study.theory_sections import actions_section, grid_section

TITLE = "Is DPO superior to PPO? The study again"
CHIPS = {"agrees": "good", "contradicts": "warning", "open": "notice", "beside": "notice"}
HOW_TO_READ = (
    "agrees: the whole 95 % interval lies on the paper's side of zero; contradicts: on the other side; open: it "
    "holds zero; beside: the paper does not ask. The paper is Xu et al. 2024, arXiv 2404.10719."
)


def study_page(
    setting: StudySetting,
    theory: Mapping[str, Any] | None,
    results: Mapping[str, Mapping[str, Any]],
    facts: Mapping[str, str],
) -> str:
    """The whole page, of whatever is done so far."""
    sections: list[Child] = []
    findings: list[Finding] = []
    if theory is not None:
        findings += theory_findings(theory, setting.theory.shown)
        sections += [actions_section(theory["three_actions"]), grid_section(theory, setting.theory)]
    if setting.sentiment is not None and "reference" in results:
        places, ablated = places_of(setting.sentiment, results), ablated_of(setting.sentiment, results)
        findings += [*sentiment_findings(places), *ablation_findings(ablated)]
        sections.append(frontier_section(setting.sentiment, results, places))
        sections.append(ablation_section(setting.sentiment, ablated) if ablated else None)
    return document(
        TITLE,
        header(TITLE, _facts(facts, theory, results)),
        section("Findings", element("p", HOW_TO_READ, class_="hint"), findings_list(findings), anchor="findings"),
        *sections,
        section("How it was run", *_setting(setting, facts), anchor="setting"),
    )


def findings_list(findings: Sequence[Finding]) -> Markup:
    """Every claim with its verdict in a word."""
    items = [
        element(
            "li",
            element("span", finding.verdict, class_=f"chip {CHIPS[finding.verdict]}"),
            element("div", element("strong", _ended(finding.claim)), f" {finding.figures}."),
        )
        for finding in findings
    ]
    return element("ul", *items, class_="verdicts", aria_label="Findings")


def _ended(claim: str) -> str:
    return claim if claim.endswith("?") else f"{claim}."


def _facts(
    facts: Mapping[str, str], theory: Mapping[str, Any] | None, results: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    spent = {
        "theory": sum(part["seconds"] for part in (theory["three_actions"], *theory["cells"])) if theory else 0.0,
        f"{len(results)} runs of language models": sum(result["seconds"] for result in results.values()),
    }
    return [facts["date"], facts["machine"], *(f"{part}: {duration(s)}" for part, s in spent.items() if s)]


def _setting(setting: StudySetting, facts: Mapping[str, str]) -> tuple[Markup, ...]:
    text = yaml.safe_dump(setting.model_dump(mode="json"), sort_keys=False)
    return key_values(list(facts.items())), element("pre", text)
