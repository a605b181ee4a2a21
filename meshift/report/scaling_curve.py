"""Throughput over what was varied, as a curve; over devices beside the line of perfect scaling.

It knows nothing of how plans are found.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshift.planner.variants import Variant
from meshift.report.line_chart import Caption, Line, line_chart
from meshift.report.markup import Markup
from meshift.report.series import Series


def scaling_curve(variants: Sequence[Variant]) -> Markup | None:
    """None over factors, and where there are fewer than two whole numbers to draw over."""
    points = sorted({one.number: one for one in variants if one.fits}.items())
    if variants[0].key == "network" or len(points) < 2 or any(number != int(number) for number, _ in points):
        return None
    key = variants[0].key
    numbers = [int(number) for number, _ in points]
    found = [Line(label="predicted", series=Series(numbers, [one.tokens for _, one in points]), exact=True)]
    if key == "devices":
        first = points[0][1].tokens
        ideal = [first * number / numbers[0] for number in numbers]
        found.append(Line(label="perfect scaling", series=Series(numbers, ideal), slot=6, exact=True))
    caption = Caption(title="Tokens a second", key=key, note="predicted for the best plan of each")
    return line_chart(caption, found, at_points=True)
