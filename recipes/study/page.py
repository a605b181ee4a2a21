"""The study's report: findings first, then each part's pictures and tables, then how it was run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from meshift.report.document import document, key_values, section
from meshift.report.markup import Child, Markup, element
from meshift.report.numbers import duration
from meshift.report.run_page import header
from recipes.study.code_section import code_findings, code_section
from recipes.study.findings import Finding, ablation_findings, sentiment_findings, theory_findings
from recipes.study.sentiment_sections import ablated_of, ablation_section, frontier_section, places_of
from recipes.study.setting import StudySetting
from recipes.study.theory_sections import actions_section, grid_section

TITLE = "Is DPO superior to PPO? The study again"
CHIPS = {
    "agrees": "good",
    "contradicts": "warning",
    "open": "notice",
    "beside": "notice",
    "one seed agrees": "good",
    "one seed contradicts": "warning",
}
HOW_TO_READ = (
    "agrees: the whole 95 % interval lies on the paper's side of zero; contradicts: on the other side; open: it "
    "holds zero; one seed: the interval is over the prompts of one run, and another run may end elsewhere; "
    "beside: the paper does not ask. The paper is Xu et al. 2024, arXiv 2404.10719."
)


@dataclass(frozen=True, kw_only=True)
class Done:
    """The results of each part so far; None (or empty) for one that was not run."""

    theory: Mapping[str, Any] | None = None
    sentiment: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    code: Mapping[str, Any] | None = None


def study_page(setting: StudySetting, done: Done, facts: Mapping[str, str]) -> str:
    """The whole page, of whatever is done so far."""
    theory, results = done.theory, done.sentiment
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
    if setting.code is not None and done.code is not None:
        findings += code_findings(setting.code, done.code)
        sections.append(code_section(setting.code, done.code))
    return document(
        TITLE,
        header(TITLE, _facts(facts, done)),
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


def _facts(facts: Mapping[str, str], done: Done) -> list[str]:
    theory, results = done.theory, done.sentiment
    spent = {
        "theory": sum(part["seconds"] for part in (theory["three_actions"], *theory["cells"])) if theory else 0.0,
        f"{len(results)} runs of language models": sum(result["seconds"] for result in results.values()),
        "code": done.code["seconds"] if done.code else 0.0,
    }
    return [facts["date"], facts["machine"], *(f"{part}: {duration(s)}" for part, s in spent.items() if s)]


def _setting(setting: StudySetting, facts: Mapping[str, str]) -> tuple[Markup, ...]:
    text = yaml.safe_dump(setting.model_dump(mode="json"), sort_keys=False)
    return key_values(list(facts.items())), element("pre", text)
