"""Completions to read: the same prompts through training side by side, and the best and worst of some steps.

It knows nothing of metrics. Texts of a run are data: they are escaped, shortened, and keep their own direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from meshift.report.markup import Child, Markup, element
from meshift.report.numbers import short
from meshift.report.run_data import RunData, Sample

MAX_STEPS = 6
MAX_PROMPTS = 12
MAX_CHARACTERS = 1200


def fixed_table(run: RunData) -> Markup | None:
    """One row per prompt that was sampled through the run, one column per step; None where there is none."""
    fixed = _samples(run, fixed=True)
    if not fixed:
        return None
    steps = spread({sample.step for sample in fixed}, MAX_STEPS)
    by_place = {(sample.index, sample.step): sample for sample in fixed}
    prompts = {sample.index: sample.prompt for sample in fixed}
    rows = [
        [prompts[index], *(by_place.get((index, step)) for step in steps)]
        for index in sorted(prompts)[:MAX_PROMPTS]
    ]
    return side_by_side([_step_title(step) for step in steps], rows)


def logged_table(run: RunData) -> Markup | None:
    """Of some steps the completions with the highest, the median and the lowest reward; None without samples."""
    drawn = _samples(run, fixed=False)
    steps = spread({sample.step for sample in drawn}, 4)
    if not steps:
        return None
    columns = {step: _ranked([sample for sample in drawn if sample.step == step]) for step in steps}
    ranks = ("Highest reward", "Median", "Lowest reward")
    rows = [[title, *(columns[step].get(title) for step in steps)] for title in ranks]
    rows = [row for row in rows if any(row[1:])]
    return side_by_side([_step_title(step) for step in steps], rows, with_prompts=True)


def last_fixed(run: RunData) -> Mapping[str, Sample]:
    """By prompt, the completions that the last weights gave to the run's fixed prompts."""
    fixed = _samples(run, fixed=True)
    last = max((sample.step for sample in fixed), default=0)
    return {sample.prompt: sample for sample in fixed if sample.step == last}


def _samples(run: RunData, *, fixed: bool) -> list[Sample]:
    """Those of one kind. Where the length limit is the task's end, reaching it is not worth a word."""
    meant = bool(run.setting("ppo.length_limit_is_end", False))
    return [replace(s, truncated=s.truncated and not meant) for s in run.samples if s.fixed == fixed]


def spread(steps: set[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spaced, the first and the last among them."""
    ordered = sorted(steps)
    if len(ordered) <= count:
        return ordered
    return [ordered[i] for i in sorted({round(x) for x in np.linspace(0, len(ordered) - 1, count)})]


def _ranked(samples: Sequence[Sample]) -> dict[str, Sample]:
    ordered = sorted(samples, key=lambda s: -np.inf if s.reward is None else s.reward, reverse=True)
    found = {"Highest reward": ordered[0]}
    if len(ordered) > 2:
        found["Median"] = ordered[len(ordered) // 2]
    if len(ordered) > 1:
        found["Lowest reward"] = ordered[-1]
    return found


def _step_title(step: int) -> str:
    return "Before training" if step == 0 else f"Step {step:,}"


def side_by_side(
    titles: Sequence[str], rows: Sequence[Sequence[str | Sample | None]], *, with_prompts: bool = False
) -> Markup:
    """A table whose rows begin with a text; `with_prompts` puts each completion's own prompt before it."""
    head = element("tr", element("th", "Prompt" if not with_prompts else "", scope="col"), *map(_column, titles))
    body = [
        element("tr", *(_cell(cell, with_prompts, first=i == 0) for i, cell in enumerate(row))) for row in rows
    ]
    table = element("table", element("thead", head), element("tbody", *body), class_="texts")
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Completions")


def _column(title: str) -> Markup:
    return element("th", title, scope="col")


def _cell(cell: str | Sample | None, with_prompt: bool, *, first: bool) -> Markup:
    if first:
        return element("th", shortened(str(cell)), scope="row", dir="auto")
    if not isinstance(cell, Sample):
        return element("td", "\N{EN DASH}")
    facts = [f"reward {short(cell.reward)}"] if cell.reward is not None else []
    facts += ["length limit"] if cell.truncated else []
    text: list[Child] = [element("span", shortened(cell.prompt), class_="prompt")] if with_prompt else []
    # Beside its prompt a completion keeps its first space; alone it would only look indented.
    completion = cell.completion if with_prompt else cell.completion.lstrip(" ")
    text.append(shortened(completion) or element("em", "empty"))
    return element(
        "td",
        element("div", *text, class_="text", dir="auto"),
        element("div", " \N{MIDDLE DOT} ".join(facts), class_="facts") if facts else None,
    )


def shortened(text: str) -> str:
    """The text, or its beginning and how much is missing."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} \N{HORIZONTAL ELLIPSIS} ({len(text) - MAX_CHARACTERS:,} more characters)"
