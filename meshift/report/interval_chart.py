"""A chart of means with their intervals, in one direction or both, as inline SVG with its caption.

It knows nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from meshift.report.axes import Axis, linear_axis
from meshift.report.line_chart import Caption
from meshift.report.markup import Markup, element
from meshift.report.numbers import short

HEIGHT = 300
"""Of the plot, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """A value and its interval; without one `low` and `high` are the value."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Span:
        """A value without an interval."""
        return cls(value=value, low=value, high=value)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of the chart; `name` is shown when the pointer rests on it."""

    x: Span
    y: Span
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Track:
    """Marks of one colour, joined by a line in the order given."""

    label: str
    marks: Sequence[Mark]
    slot: int = 0


def interval_chart(caption: Caption, tracks: Sequence[Track], across: str, height: int = HEIGHT) -> Markup:
    """The chart; `caption.key` says what is up, `across` what is across."""
    marks = [mark for track in tracks for mark in track.marks]
    x_axis, y_axis = _axis(mark.x for mark in marks), _axis(mark.y for mark in marks)
    drawn = [part for track in tracks for part in _track(track, x_axis, y_axis)]
    legend = [
        element("span", element("i", class_=f"swatch c{track.slot}"), track.label, class_="entry")
        for track in tracks
    ]
    return element(
        "figure",
        element(
            "figcaption",
            element("span", caption.title, class_="title"),
            element("span", f"up: {caption.key}; across: {across}", class_="key"),
            element("span", caption.note, class_="key") if caption.note else None,
            element("span", *legend, class_="legend") if len(tracks) > 1 else None,
        ),
        element(
            "svg",
            *_grid(x_axis, y_axis, height),
            *drawn,
            role="img",
            aria_label=_described(caption, tracks),
            class_="box",
            height=height,
        ),
        class_="intervals",
    )


def _axis(spans: Iterable[Span]) -> Axis:
    ends = [end for span in spans for end in (span.low, span.value, span.high)]
    # Twice, so that an axis of many points leaves no lone one out: here each is wanted.
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    return linear_axis(np.array([low, high]))


def _grid(x_axis: Axis, y_axis: Axis, height: int) -> list[Markup]:
    found = []
    for position, label in y_axis.labelled_ticks():
        y = _percent(1 - position)
        found.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="rule"))
        found.append(element("text", label, x=-7, y=y, dy="0.32em", class_="y"))
    for position, label in x_axis.labelled_ticks():
        found.append(element("text", label, x=_percent(position), y=height + 16, class_="x"))
    return found


def _track(track: Track, x_axis: Axis, y_axis: Axis) -> list[Markup]:
    kind = f"c{track.slot}"
    found = [_line(a.x.value, a.y.value, b.x.value, b.y.value) for a, b in pairwise(track.marks)]
    parts = [_drawn(line, x_axis, y_axis, f"link {kind}") for line in found]
    for mark in track.marks:
        x, y = mark.x, mark.y
        whiskers = [_line(x.low, y.value, x.high, y.value), _line(x.value, y.low, x.value, y.high)]
        parts += [_drawn(line, x_axis, y_axis, f"whisker {kind}") for line in whiskers if line[:2] != line[2:]]
        title = element("title", f"{track.label} {mark.name}: {_words(x)} across, {_words(y)} up")
        centre = {"cx": _percent(x_axis.at(x.value)), "cy": _percent(1 - y_axis.at(y.value))}
        parts.append(element("circle", title, **centre, r=3.5, class_=f"dot {kind}"))
    return parts


def _line(x1: float, y1: float, x2: float, y2: float) -> tuple[float, float, float, float]:
    return x1, y1, x2, y2


def _drawn(line: tuple[float, float, float, float], x_axis: Axis, y_axis: Axis, kind: str) -> Markup:
    x1, x2 = (_percent(x_axis.at(x)) for x in line[::2])
    y1, y2 = (_percent(1 - y_axis.at(y)) for y in line[1::2])
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def _percent(part: float) -> str:
    return f"{100 * part:.2f}%"


def _words(span: Span) -> str:
    if span.low == span.high:
        return short(span.value)
    return f"{short(span.value)} ({short(span.low)} to {short(span.high)})"


def _described(caption: Caption, tracks: Sequence[Track]) -> str:
    """The text alternative: every mark in words."""
    parts = [
        f"{track.label}: "
        + "; ".join(f"{mark.name} at {_words(mark.x)}, {_words(mark.y)}" for mark in track.marks)
        for track in tracks
    ]
    return f"{caption.title}. {'. '.join(parts)}"
