"""Seconds per call as a stacked chart over steps, and as a table of means and shares.

It knows nothing of what calls do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshift.report.axes import Axis
from meshift.report.line_chart import HEIGHT, SIDE, grid
from meshift.report.markup import Markup, element
from meshift.report.numbers import duration, percent
from meshift.report.run_data import RunData
from meshift.report.series import Series

PREFIX, STEP_TIME, REST = "timing_s/", "perf/time_per_step", "other"
MAX_CALLS = 8
MAX_COLUMNS = 90
VISIBLE = 0.002
"""A call with less than this part of the time is counted among the others."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """`seconds[c, i]` is what call `names[c]` took in step `steps[i]`; calls in the order of the step."""

    names: Sequence[str]
    steps: np.ndarray
    seconds: np.ndarray

    @property
    def means(self) -> Mapping[str, float]:
        """Mean seconds a step."""
        return {name: float(row.mean()) for name, row in zip(self.names, self.seconds, strict=True)}


def timeline_of(run: RunData) -> Timeline | None:
    """A run's calls, the smallest together as `other`, with what of the step's time belongs to no call."""
    calls = {key.removeprefix(PREFIX): s for key, s in run.metrics.items() if key.startswith(PREFIX)}
    if not calls:
        return None
    total = run.series(STEP_TIME)
    steps = np.unique(np.concatenate([series.steps for series in (*calls.values(), total)]))
    rows = {name: _on(series, steps) for name, series in calls.items()}
    kept = sorted(rows, key=lambda name: -rows[name].sum())[:MAX_CALLS]
    everything = np.maximum(_on(total, steps), np.sum(list(rows.values()), axis=0))
    names = [name for name in rows if name in kept and rows[name].sum() > VISIBLE * everything.sum()]
    seconds = np.array([rows[name] for name in names]).reshape(len(names), len(steps))
    rest = np.maximum(everything - seconds.sum(axis=0), 0.0)
    if not names or rest.sum() > VISIBLE * everything.sum():
        names, seconds = [*names, REST], np.vstack([seconds, rest])
    return Timeline(names=names, steps=steps, seconds=seconds)


def _on(series: Series, steps: np.ndarray) -> np.ndarray:
    """The series' values on given steps; 0 where it has none."""
    found = np.zeros(len(steps))
    found[np.searchsorted(steps, series.steps)] = np.nan_to_num(series.values)
    return found


def timeline_chart(timeline: Timeline) -> Markup:
    """Stacked columns, one per step; of many steps one per few, with their mean."""
    parts = np.array_split(np.arange(len(timeline.steps)), min(MAX_COLUMNS, len(timeline.steps)))
    columns = np.stack([timeline.seconds[:, part].mean(axis=1) for part in parts], axis=1)
    axis = Axis(low=0.0, high=float(columns.sum(axis=0).max()) * 1.04 or 1.0)
    data = {
        "x": [int(timeline.steps[part[0]]) for part in parts],
        "calls": [[n, [float(f"{v:.3g}") for v in row]] for n, row in zip(timeline.names, columns, strict=True)],
    }
    caption = element(
        "figcaption",
        element("span", "Seconds per step", class_="title"),
        element("span", class_="read"),
        element("span", *legend(timeline.names), class_="legend"),
    )
    box = _box(timeline, columns, axis)
    return element("figure", caption, box, class_="chart wide", data_stack=json.dumps(data, separators=(",", ":")))


def _box(timeline: Timeline, columns: np.ndarray, axis: Axis) -> Markup:
    tops = columns.cumsum(axis=0)
    paths = [
        element("path", d=_columns(tops[c] - columns[c], tops[c], axis), class_=f"area {colour(name, c)}")
        for c, name in enumerate(timeline.names)
    ]
    square = element("svg", *paths, viewBox=f"0 0 {SIDE} {SIDE}", preserveAspectRatio="none", class_="paths")
    # Half a step on either side: a column stands over its step.
    lines = grid(axis, (float(timeline.steps[0]) - 0.5, float(timeline.steps[-1]) + 0.5))
    return element("svg", *lines, square, role="img", aria_label=_described(timeline), class_="box", height=HEIGHT)


def _columns(low: np.ndarray, high: np.ndarray, axis: Axis) -> str:
    """One rectangle per column, from `low` to `high`, as a single path."""
    slot = SIDE / len(low)
    gap = 0.14 * slot
    parts = []
    for i, (bottom, top) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        y, height = SIDE * (1 - axis.at(top)), SIDE * (axis.at(top) - axis.at(bottom))
        parts.append(f"M{i * slot + gap / 2:.1f},{y:.1f}h{slot - gap:.1f}v{height:.1f}h-{slot - gap:.1f}z")
    return "".join(parts)


def colour(name: str, position: int) -> str:
    """The class that colours a call; what belongs to no call is grey."""
    return "rest" if name == REST else f"c{position}"


def legend(names: Sequence[str]) -> list[Markup]:
    """Swatches and names."""
    return [
        element("span", element("i", class_=f"swatch {colour(name, i)}"), name, class_="entry")
        for i, name in enumerate(names)
    ]


def _described(timeline: Timeline) -> str:
    means = "; ".join(f"{name} {duration(seconds)}" for name, seconds in timeline.means.items())
    return f"Seconds per step by call, on average: {means}"


def time_table(timeline: Timeline) -> Markup:
    """Mean seconds and share of every call."""
    total = sum(timeline.means.values()) or 1.0
    rows = [
        element(
            "tr",
            element("th", element("i", class_=f"swatch {colour(name, i)}"), name, scope="row"),
            element("td", duration(seconds), class_="number"),
            element("td", percent(seconds / total), class_="number"),
            element("td", share_bar([(colour(name, i), seconds / total)]), class_="bar"),
        )
        for i, (name, seconds) in enumerate(timeline.means.items())
    ]
    head = element("tr", *(element("th", text, scope="col") for text in ("Call", "Mean", "Share", "")))
    return element("table", element("thead", head), element("tbody", *rows), class_="times")


def share_bar(shares: Sequence[tuple[str, float]]) -> Markup:
    """A horizontal bar of parts, each a colour class and a share of the whole width."""
    left, parts = 0.0, []
    for kind, share in shares:
        parts.append(element("rect", x=f"{100 * left:.2f}%", width=f"{100 * share:.2f}%", height=10, class_=kind))
        left += share
    return element("svg", *parts, class_="share", height=10, aria_hidden="true")
