"""A small table of numbers as coloured cells, as inline SVG. It knows nothing of what the numbers are."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from meshift.report.markup import Markup, element

CELL = 26
EDGE = 16


def heat_table(
    title: str,
    rows: Sequence[Sequence[float]],
    *,
    low: float,
    high: float,
    ringed: Collection[tuple[int, int]] = (),
    decimals: int = 2,
) -> Markup:
    """Cells from pale (`low`) to full colour (`high`), each with its number; `ringed` (row, column) get a ring."""
    parts: list[Markup] = []
    for i, row in enumerate(rows):
        parts.append(element("text", str(i + 1), x=EDGE - 5, y=EDGE + (i + 0.66) * CELL, class_="edge"))
        for j, value in enumerate(row):
            parts += _cell(i, j, value, (value - low) / (high - low) if high > low else 0.0, decimals)
    for j in range(len(rows[0])):
        parts.append(element("text", str(j + 1), x=EDGE + (j + 0.5) * CELL, y=EDGE - 5, class_="edge"))
    for i, j in ringed:
        centre = {"cx": EDGE + (j + 0.5) * CELL, "cy": EDGE + (i + 0.5) * CELL}
        parts.append(element("circle", **centre, r=0.5 * CELL, class_="ring"))
    size = (EDGE + CELL * len(rows[0]), EDGE + CELL * len(rows))
    words = "; ".join(" ".join(f"{value:.{decimals}f}" for value in row) for row in rows)
    drawing = element(
        "svg", *parts, role="img", aria_label=f"{title}, by row: {words}", viewBox=f"0 0 {size[0]} {size[1]}"
    )
    caption = element("figcaption", element("span", title, class_="title"))
    return element("figure", caption, drawing, class_="heat")


def _cell(i: int, j: int, value: float, part: float, decimals: int) -> list[Markup]:
    part = min(1.0, max(0.0, part))
    x, y = EDGE + j * CELL, EDGE + i * CELL
    square = {"x": x + 0.5, "y": y + 0.5, "width": CELL - 1, "height": CELL - 1}
    text = f"{value:.{decimals}f}"
    text = text.removeprefix("0") if 0 <= value < 1 and decimals else text
    return [
        element("rect", **square, class_="c0", fill_opacity=0.06 + 0.94 * part),
        element("text", text, x=x + CELL / 2, y=y + 0.63 * CELL, class_="full" if part > 0.55 else "pale"),
    ]
