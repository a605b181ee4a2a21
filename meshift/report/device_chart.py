"""A step on its devices: for each process of a run by plan, when which call ran, as the run measured it.

It knows nothing of plans; where calls ran is what the run wrote down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from meshift.report.markup import Markup, element
from meshift.report.numbers import duration, tick_labels, ticks
from meshift.report.run_data import RunData
from meshift.report.timeline import PREFIX, colour, legend

START = "start_s/"
WIDTH, ROW, GAP, LEFT, FOOT = 1000, 26, 6, 84, 22
"""Of the drawing, in its own units."""
FIRST_STEPS = 1
"""Left out where there are more: memory is touched for the first time, and kernels are chosen."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A call: its colour, when it began and how long it took (seconds into the step), and on which processes."""

    name: str
    position: int
    start: float
    seconds: float
    processes: Sequence[int]


def bars_of(run: RunData) -> list[Bar]:
    """Every call that was placed and timed, its times the medians over steps; in the order in which they begin."""
    found: list[tuple[float, float, str]] = []
    for name in run.placements:
        start, seconds = (run.series(prefix + name).values for prefix in (START, PREFIX))
        if len(start) and len(start) == len(seconds):
            kept = slice(FIRST_STEPS if len(start) > FIRST_STEPS else 0, None)
            found.append((float(np.median(start[kept])), float(np.median(seconds[kept])), name))
    return [
        Bar(name=name, position=i, start=start, seconds=seconds, processes=run.placements[name])
        for i, (start, seconds, name) in enumerate(sorted(found))
    ]


def device_chart(bars: Sequence[Bar], row_name: str = "process") -> Markup:
    """One row a process (or what else the numbers of `processes` are), time from left to right."""
    rows = 1 + max(process for bar in bars for process in bar.processes)
    end = max(bar.start + bar.seconds for bar in bars)
    scale = (WIDTH - LEFT) / end
    height = rows * (ROW + GAP) + FOOT
    marks = [mark for mark in ticks(0.0, end, 6) if mark <= end]
    parts: list[Markup] = []
    for mark, label in zip(marks, tick_labels(marks), strict=True):
        x = LEFT + mark * scale
        parts.append(element("line", x1=x, x2=x, y1=0, y2=height - FOOT, class_="rule"))
        text = label if mark else f"{label} s"
        parts.append(element("text", text, x=x, y=height - 6, class_="x"))
    for process in range(rows):
        y = process * (ROW + GAP)
        parts.append(element("text", f"{row_name} {process}", x=0, y=y + 0.66 * ROW))
        for bar in bars:
            if process in bar.processes:
                parts.append(_bar(bar, y, scale))
    caption = element(
        "figcaption",
        element("span", "A step on its devices", class_="title"),
        element("span", *legend([bar.name for bar in bars]), class_="legend"),
    )
    label = "; ".join(
        f"{bar.name} on {_named(bar.processes)} from {duration(bar.start)} for {duration(bar.seconds)}"
        for bar in bars
    )
    drawing = element(
        "svg", *parts, role="img", aria_label=label, class_="devices", viewBox=f"0 0 {WIDTH} {height}"
    )
    return element("figure", caption, drawing, class_="chart wide")


def _bar(bar: Bar, y: int, scale: float) -> Markup:
    said = f"{bar.name}: {duration(bar.seconds)}, from {duration(bar.start)}"
    return element(
        "rect",
        element("title", said),
        x=LEFT + bar.start * scale,
        y=y,
        width=max(1.0, bar.seconds * scale),
        height=ROW,
        class_=colour(bar.name, bar.position % 8),
    )


def _named(processes: Sequence[int]) -> str:
    return ", ".join(map(str, processes))
