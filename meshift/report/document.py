"""The page around the report's sections: head, style, script, and a policy that lets nothing else run or load.

It knows nothing of runs.
"""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files

from meshift import __version__
from meshift.report.markup import Child, Markup, element

STYLE, SCRIPT = "report.css", "report.js"


def document(title: str, *sections: Child) -> str:
    """A whole HTML page that needs no other file."""
    style, script = _asset(STYLE), _asset(SCRIPT)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )
    footer = element("footer", f"Written by meshift {__version__}. This file needs no network.")
    body = element("body", element("main", *sections, footer), element("script", Markup(script)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _policy(style: str, script: str) -> str:
    """Only this very style and this very script; no image, font, frame, form or connection."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _asset(name: str) -> str:
    return files("meshift.report").joinpath(name).read_text(encoding="utf-8")


def section(title: str, *children: Child, anchor: str) -> Markup:
    """A heading and what stands under it."""
    return element("section", element("h2", title), *children, id=anchor)


def key_values(rows: list[tuple[str, str]]) -> Markup:
    """A table of two columns."""
    body = [element("tr", element("th", key, scope="row"), element("td", value)) for key, value in rows]
    return scrolling(element("table", element("tbody", *body), class_="pairs"))


def number_table(head: list[str], rows: list[list[str]], *, numbers: bool = True) -> Markup:
    """A table whose first column names the row; the others hold numbers, right-aligned, or texts."""
    kind = "number" if numbers else None
    top = [element("th", text, scope="col", class_=kind if i else None) for i, text in enumerate(head)]
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell, class_=kind) for cell in row[1:]))
        for row in rows
    ]
    table = element("table", element("thead", element("tr", *top)), element("tbody", *body), class_="figures")
    return scrolling(table)


def scrolling(table: Markup) -> Markup:
    """A table that scrolls in its own box where the screen is narrow."""
    return element("div", table, class_="scroll", tabindex=0)
