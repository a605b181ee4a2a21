"""Predicted beside measured, as the report shows it: a row for each call, with a bar of each.

It knows nothing of how they are compared (`reconciled.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from meshift.report.document import scrolling, section
from meshift.report.markup import Markup, element
from meshift.report.numbers import DASH, duration, short
from meshift.report.reconciled import Compared, Reconciled, reconcile
from meshift.report.run_data import RunData

HEAD = ("Call", "Predicted", "Measured", "Measured / predicted", "", "Memory predicted, GB", "Memory measured, GB")


def reconciled_section(run: RunData) -> Markup | None:
    """The section of the page; None where nothing was predicted."""
    found = reconcile(run)
    if found is None:
        return None
    return section(
        "Predicted and measured",
        *(element("p", *_with_code(sentence)) for sentence in found.sentences),
        _table(found),
        element("p", _hint(run), class_="hint"),
        anchor="predicted",
    )


def _with_code(sentence: str) -> Iterator[Markup | str]:
    """What stands between backticks as code."""
    for i, part in enumerate(sentence.split("`")):
        yield element("code", part) if i % 2 else part


def _hint(run: RunData) -> str:
    hardware = run.plan.get("hardware")
    name = hardware.get("name") if isinstance(hardware, dict) else None
    return (
        f"Predicted as the run began, for {name or 'its hardware'} and the texts that it was told of; measured: "
        "the medians of its steps (the first left out), and the highest peak. The upper bar is the prediction."
    )


def _table(found: Reconciled) -> Markup:
    rows: Sequence[Compared] = (*found.calls, found.step)
    most = max(max(one.predicted, one.measured) for one in rows)
    head = element("tr", *(element("th", text, scope="col", class_=_kind(i)) for i, text in enumerate(HEAD)))
    body = [_row(one, most) for one in rows]
    table = element("table", element("thead", head), element("tbody", *body), class_="figures predicted")
    return scrolling(table)


def _kind(position: int) -> str | None:
    return None if position in (0, 4) else "number"


def _row(one: Compared, most: float) -> Markup:
    ratio = short(one.measured / one.predicted, 3) if one.predicted > 0 else DASH
    cells = [duration(one.predicted), duration(one.measured), ratio]
    memory = [DASH if size is None else short(size) for size in (one.predicted_gb, one.measured_gb)]
    return element(
        "tr",
        element("th", one.name, scope="row"),
        *(element("td", text, class_="number") for text in cells),
        element("td", _bars(one, most), class_="bar"),
        *(element("td", text, class_="number") for text in memory),
    )


def _bars(one: Compared, most: float) -> Markup:
    bars = [
        element("rect", x="0%", y=y, width=f"{100 * seconds / most:.2f}%", height=5, class_=kind)
        for y, seconds, kind in ((0, one.predicted, "rest"), (7, one.measured, "c0"))
    ]
    return element("svg", *bars, class_="share", height=12, aria_hidden="true")
