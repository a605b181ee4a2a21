"""An evaluation as a page: its numbers with their intervals, and completions to read beside what they got.

It knows nothing of how anything was scored: it shows what `results.json` and `scores.jsonl` hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshift.report.completion_tables import shortened
from meshift.report.document import document, key_values, number_table, section
from meshift.report.markup import Child, Markup, element
from meshift.report.numbers import MINUS, counted, duration, short, tick_labels

MIN_FOR_INTERVAL, TOO_FEW = 3, "too few"
"""Questions: an interval of fewer spans most of what is possible."""
LONGEST_NAME = 46
"""Characters of a number's name that fit beside its line."""
MAX_SHOWN = 20
"""Completions of a kind, evenly over all there are."""
WIDTH, ROW, GAP, LEFT, FOOT = 1000, 22, 8, 330, 22
"""Of the drawing, in its own units."""
PARTS = ("accuracy", "rate", "tests passed", "judged", "agrees", "prefers", "truncated", "@")
"""In the names of numbers between 0 and 1."""
MARKS = ("id", "sample", "wrong", "judge_wrong")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A completion (`said`) of what was asked; `found` is its line of `scores.jsonl`."""

    asked: str
    said: str
    truncated: bool
    found: Mapping[str, Any]


def evaluation_page(results: Mapping[str, Any], answers: Sequence[Answer]) -> str:
    """The whole page, which needs no other file."""
    metrics: Mapping[str, Mapping[str, Any]] = results["metrics"]
    model = results["model"] or results["settings"].get("completions") or "completions"
    if results["model"] and not results.get("model_is_verified", True):
        model = f"{model} (unverified)"
    title = f"{results['task']}: {model}"
    facts = (
        f"{counted(results['num_questions'], 'question')}, {counted(results['num_completions'], 'completion')}, "
        f"scored in {duration(results['seconds'])}"
    )
    settings = results["settings"].items()
    given = [
        (name, str(value)) for name, value in settings if not (value is None or value is False or value == [])
    ]
    return document(
        title,
        element("h1", title),
        element("p", facts, class_="hint"),
        _notes(results.get("notes", [])),
        section("Numbers", _chart(metrics), _table(metrics), anchor="numbers"),
        section("Completions", *_answers(answers), anchor="completions"),
        section("Settings", key_values([("data", str(results["data"])), *given]), anchor="settings"),
    )


def _notes(notes: Sequence[str]) -> Markup | None:
    """As a run's page shows its diagnoses."""
    chip = element("span", "notice", class_="chip notice")
    items = [element("li", chip, element("span", note)) for note in notes]
    return element("ul", *items, class_="verdicts") if items else None


def _table(metrics: Mapping[str, Mapping[str, Any]]) -> Markup:
    rows = [
        [name, _shown(one["value"]), *(_shown(end) for end in interval(one)), f"{one['num']:,}"]
        for name, one in metrics.items()
    ]
    return number_table(["", "value", "from", "to (95 % interval)", "questions"], rows)


def interval(one: Mapping[str, Any]) -> tuple[Any, Any]:
    """From and to, as far as they are worth showing: `TOO_FEW` and nothing where there are too few questions."""
    is_shown = one["num"] >= MIN_FOR_INTERVAL or one["value"] is None
    return (one["low"], one["high"]) if is_shown else (TOO_FEW, None)


def _shown(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else short(value, 4)


def _chart(metrics: Mapping[str, Mapping[str, Any]]) -> Markup | None:
    """A line from 0 to 1 for each number that is a part of one: its interval, and where it stands in it."""
    parts = [(name, one) for name, one in metrics.items() if one["low"] is not None and _is_part(name, one)]
    if not parts:
        return None
    height = len(parts) * (ROW + GAP) + FOOT
    drawn: list[Markup] = []
    marks = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    for mark, label in zip(marks, tick_labels(marks), strict=True):
        drawn.append(element("line", x1=_x(mark), x2=_x(mark), y1=0, y2=height - FOOT, class_="rule"))
        drawn.append(element("text", label, x=_x(mark), y=height - 6, class_="x"))
    for i, (name, one) in enumerate(parts):
        y = i * (ROW + GAP)
        fits = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"
        drawn.append(element("text", element("title", name), fits, x=0, y=y + 0.7 * ROW))
        drawn += _line(name, one, y)
    label = "; ".join(f"{name} {short(one['value'])}" for name, one in parts)
    view = f"0 0 {WIDTH} {height}"
    drawing = element("svg", *drawn, role="img", aria_label=label, class_="devices", viewBox=view)
    return element("figure", drawing, class_="chart wide")


def _line(name: str, one: Mapping[str, Any], y: float) -> list[Markup]:
    """The interval, where it is worth drawing, and the value on it."""
    low, high = interval(one)
    value, said = _x(one["value"]), f"{name}: {short(one['value'])}"
    found: list[Markup] = []
    if low == TOO_FEW:
        said += f" (of {counted(one['num'], 'question')}: too few for an interval)"
    else:
        said += f", from {short(low)} to {short(high)}"
        box = {"x": _x(low), "y": y + ROW / 2 - 2, "width": max(1.0, _x(high) - _x(low)), "height": 4}
        found.append(element("rect", element("title", said), **box, class_="rest"))
    box = {"x": value - 3, "y": y + 3, "width": 6, "height": ROW - 6}
    return [*found, element("rect", element("title", said), **box, class_="c0")]


def _is_part(name: str, one: Mapping[str, Any]) -> bool:
    return any(word in name for word in PARTS) and 0 <= one["value"] <= 1


def _x(part: float) -> float:
    return LEFT + part * (WIDTH - LEFT - 24)


def _answers(answers: Sequence[Answer]) -> list[Child]:
    """Those that are wrong and those that are right, or where nothing is either, some of all."""
    wrong = [one for one in answers if one.found.get("right") is False]
    right = [one for one in answers if one.found.get("right") is True]
    if not wrong and not right:
        return [_answer_table(answers, "")]
    return [_answer_table(one, name) for one, name in ((wrong, "Wrong"), (right, "Right")) if one]


def _answer_table(answers: Sequence[Answer], name: str) -> Markup:
    places = np.linspace(0, len(answers) - 1, min(MAX_SHOWN, len(answers)))
    shown = [answers[i] for i in sorted({round(place) for place in places})]
    some = f"{len(shown)} of {len(answers):,}" if len(shown) < len(answers) else f"{len(answers):,}"
    head = element("tr", *(element("th", text, scope="col") for text in ("", "Prompt", "Completion")))
    table = element("table", element("thead", head), element("tbody", *map(_row, shown)), class_="texts")
    box = element("div", table, class_="scroll", tabindex=0, role="region", aria_label="Completions")
    return element("div", element("h3", f"{name} ({some})" if name else some), box)


def _row(one: Answer) -> Markup:
    facts = [_fact(name, value) for name, value in one.found.items() if name not in MARKS and value is not None]
    facts += ["length limit"] if one.truncated else []
    why = str(one.found.get("wrong") or one.found.get("judge_wrong") or "")
    said: Child = shortened(one.said) or element("em", "empty")
    return element(
        "tr",
        element("th", f"{one.found['id']}, sample {one.found['sample']}", scope="row", dir="auto"),
        element("td", element("div", shortened(one.asked), class_="text prompt", dir="auto")),
        element(
            "td",
            element("div", said, class_="text", dir="auto"),
            element("div", " \N{MIDDLE DOT} ".join([*facts, *([shortened(why)] if why else [])]), class_="facts"),
        ),
    )


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"not {name}"
    return f"{name} {short(value)}" if isinstance(value, float | int) else f"{name} {value}".replace("-", MINUS)
