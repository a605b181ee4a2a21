"""A chart of one or several series over steps, as inline SVG with its caption.

The plot stretches with the page while its texts keep their size. Raw values are thin, their smoothed course is
thick. It knows nothing of what a metric means.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshift.report.axes import Axis, linear_axis, log_axis, num_outside
from meshift.report.markup import Markup, element
from meshift.report.numbers import counted, short, whole_ticks
from meshift.report.series import Series

HEIGHT = 150
"""Of the plot, in pixels; the style leaves room for the labels around it."""
SIDE = 1000
"""Paths are drawn on a square of this size, which the page stretches."""
APART = 0.12
"""Of the width: labels nearer to each other would run together."""
MIN_FOR_SMOOTHING = 8
MAX_POINTS = 400
MAX_READ = 300
"""Points that the hover read-out knows."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series in a chart; `slot` chooses its colour; an `exact` one has no noise and is not smoothed."""

    label: str
    series: Series
    slot: int = 0
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Caption:
    """What stands above a chart; `key` is the metric's own name."""

    title: str
    key: str
    note: str = ""


def line_chart(caption: Caption, lines: Sequence[Line], *, raw: bool = True, at_points: bool = False) -> Markup:
    """The chart. With a logarithmic twin where that shows more; without the thin raw lines if `raw` is false.

    `at_points`: below, the steps that there are stand where there is room, and not round numbers.
    """
    values = np.concatenate([line.series.finite for line in lines]) if lines else np.zeros(0)
    linear, logarithmic = linear_axis(values), log_axis(values)
    steps = [int(step) for line in lines for step in line.series.steps]
    span = (min(steps, default=0), max(steps, default=1))
    marks = _apart(steps, span) if at_points else None
    axes = [linear] if logarithmic is None else [linear, logarithmic]
    plots = [_plot(caption, lines, axis, span, raw, marks) for axis in axes]
    outside = num_outside(linear, values)
    return element(
        "figure",
        _caption(caption, lines, outside, switch=logarithmic is not None),
        *plots,
        class_="chart",
        data_lines=json.dumps([_readable(line) for line in lines], separators=(",", ":")),
        data_span=f"{span[0]},{span[1]}",
    )


def _caption(caption: Caption, lines: Sequence[Line], outside: int, *, switch: bool) -> Markup:
    notes = [note for note in (caption.note, f"{counted(outside, 'point')} beyond" if outside else "") if note]
    last = short(lines[0].series.last) if len(lines) == 1 else ""
    legend = [
        element("span", element("i", class_=f"swatch c{line.slot}"), line.label, class_="entry")
        for line in lines
        if len(lines) > 1
    ]
    return element(
        "figcaption",
        element("span", caption.title, class_="title"),
        element("button", "log", type="button", class_="switch", hidden=True) if switch else None,
        element("span", last, class_="read"),
        element(
            "span",
            element("code", caption.key),
            f" \N{MIDDLE DOT} {', '.join(notes)}" if notes else None,
            class_="key",
        ),
        element("span", *legend, class_="legend") if legend else None,
    )


def _plot(
    caption: Caption,
    lines: Sequence[Line],
    axis: Axis,
    span: tuple[int, int],
    raw: bool,
    below: Sequence[int] | None = None,
) -> Markup:
    budget = max(40, MAX_POINTS // max(1, len(lines)))
    paths = [path for line in lines for path in _paths(line, axis, span, budget, raw)]
    marks = [mark for line in lines for mark in _marks(line, axis, span)]
    square = element("svg", *paths, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", class_="paths")
    box = "box log" if axis.log else "box"
    return element(
        "svg",
        *grid(axis, span, below),
        square,
        *marks,
        role="img",
        aria_label=_described(caption, lines),
        class_=box,
        height=HEIGHT,
    )


def grid(axis: Axis, span: tuple[float, float], below: Sequence[int] | None = None) -> list[Markup]:
    """Horizontal lines with their values, and steps below: these, or round ones."""
    found = []
    for position, label in axis.labelled_ticks():
        y = f"{100 * (1 - position):.2f}%"
        found.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="rule"))
        found.append(element("text", label, x=-7, y=y, dy="0.32em", class_="y"))
    low, high = span
    for step in whole_ticks(math.ceil(low), math.floor(high)) if below is None else below:
        position = _across(step, span)
        anchor = "end" if position > 0.97 and len(str(step)) > 2 else None
        found.append(
            element("text", f"{step:,}", x=f"{100 * position:.2f}%", y=HEIGHT + 16, class_="x", text_anchor=anchor)
        )
    return found


def _apart(steps: Sequence[int], span: tuple[int, int]) -> list[int]:
    """Those that can be labelled beside each other: the ends, and of the others the largest."""
    found = sorted({min(steps), max(steps)}) if steps else []
    for step in sorted(set(steps) - set(found), reverse=True):
        if all(abs(_across(step, span) - _across(other, span)) >= APART for other in found):
            found.append(step)
    return sorted(found)


def _across(step: float, span: tuple[float, float]) -> float:
    return (step - span[0]) / (span[1] - span[0]) if span[1] > span[0] else 0.5


def _paths(line: Line, axis: Axis, span: tuple[int, int], budget: int, raw: bool) -> list[Markup]:
    smooth = line.series.finite.size >= MIN_FOR_SMOOTHING and not line.exact
    found = []
    if raw or not smooth:
        kind = "raw" if smooth else "course"
        found.append(_path(line.series.extremes(budget), axis, span, f"{kind} c{line.slot}"))
    if smooth:
        course = line.series.smoothed().at_most(budget)
        found.append(_path(course, axis, span, f"course c{line.slot}"))
    return found


def _path(series: Series, axis: Axis, span: tuple[int, int], kind: str) -> Markup:
    """A polyline that is broken where values are missing."""
    parts, pen_down = [], False
    for step, value in zip(series.steps.tolist(), series.values.tolist(), strict=True):
        if math.isnan(value):
            pen_down = False
            continue
        y = min(2 * SIDE, max(-SIDE, SIDE * (1 - axis.at(value))))
        parts.append(f"{'L' if pen_down else 'M'}{SIDE * _across(step, span):.0f},{y:.0f}")
        pen_down = True
    return element("path", d="".join(parts), class_=kind)


def _marks(line: Line, axis: Axis, span: tuple[int, int]) -> list[Markup]:
    """Dots where there are few values, and a cross on the axis for each value that was not finite."""
    series = line.series
    found = []
    if series.finite.size <= MIN_FOR_SMOOTHING:
        for step, value in zip(series.steps[series.is_finite], series.finite, strict=True):
            x, y = f"{100 * _across(int(step), span):.2f}%", f"{100 * (1 - axis.at(float(value))):.2f}%"
            found.append(element("circle", cx=x, cy=y, r=2.5, class_=f"dot c{line.slot}"))
    for step in series.lost_steps[:50]:
        x = f"{100 * _across(step, span):.2f}%"
        found.append(element("text", "\N{MULTIPLICATION SIGN}", x=x, y="100%", dy="-2", class_="lost"))
    return found


def _described(caption: Caption, lines: Sequence[Line]) -> str:
    """The text alternative: each line's first, last, lowest and highest value."""
    parts = []
    for line in lines:
        finite = line.series.finite
        if not finite.size:
            parts.append(f"{line.label or caption.key}: no finite value")
            continue
        parts.append(
            f"{line.label or caption.key}: first {short(finite[0])}, last {short(finite[-1])}, "
            f"lowest {short(finite.min())}, highest {short(finite.max())}"
        )
    return f"{caption.title}. {'; '.join(parts)}"


def _readable(line: Line) -> dict[str, object]:
    """For the read-out: label, steps (only the ends where they are evenly spaced) and values of four digits."""
    series = line.series.at_most(MAX_READ)
    steps = series.steps.tolist()
    even = len(steps) > 2 and len(set(np.diff(series.steps).tolist())) == 1
    values = [float(f"{v:.4g}") if math.isfinite(v) else None for v in series.values.tolist()]
    return {"n": line.label, "x": [steps[0], steps[-1]] if even else steps, "y": values}
