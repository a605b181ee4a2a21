"""HTML and SVG elements as text, everything that is not itself markup escaped.

It knows nothing of the report. A text can become an element only by passing through `element`.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

Attribute = str | int | float | bool | None
VOID = frozenset(("meta", "br", "hr", "link", "input", "path", "line", "rect", "circle"))


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def element(tag: str, *children: Child, **attributes: Attribute) -> Markup:
    """`<tag attributes>children</tag>`. Strings are escaped unless they are `Markup`; None is left out.

    A trailing underscore of an attribute's name is dropped (`class_`), others become hyphens. True gives an
    attribute without a value, False and None none.
    """
    opening = tag + "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in VOID and not children:
        return Markup(f"<{opening}>" if tag in ("meta", "br", "hr", "link", "input") else f"<{opening}/>")
    return Markup(f"<{opening}>{joined(children)}</{tag}>")


def joined(children: Child) -> Markup:
    """Children one after another."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str):
        return Markup(escape(children))
    return Markup("".join(joined(child) for child in children))


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    key = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {key}"
    return f' {key}="{escape(_number(value) if isinstance(value, float) else str(value))}"'


def _number(value: float) -> str:
    """Two decimals are a hundredth of a pixel."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
