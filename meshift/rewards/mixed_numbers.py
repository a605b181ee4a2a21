r"""Mixed numbers as the fractions that they are: `1\frac{1}{2}` and `1 1/2` are 3/2.

It knows nothing of answers. Readers of mathematics take the parts apart: 11/2, or the fraction alone.
"""

from __future__ import annotations

import re

WHOLE = r"(?<![\w.,^}\\])(\d{1,3}(?:,\d{3})+|\d+)"  # not a name's, a power's, or the end of another number
PART = r"\s*(?:\{\s*(\d+)\s*\}|(\d))"
IN_LATEX = re.compile(rf"{WHOLE}\s*\\[dtc]?frac{PART}{PART}")
IN_TEXT = re.compile(rf"{WHOLE}[ \t]+([1-9]\d*)/([1-9]\d*)(?![\w/]|[.,]\d)")


def as_fractions(text: str) -> str:
    r"""The text with every mixed number as one fraction, in the same form; all else stays. A sign before it stays
    there too, and so is that of the whole: `-1\frac{1}{2}` is `-\frac{3}{2}`.

    In plain text the fraction has to be below one: `2 4/2` may be two numbers.
    """
    return IN_TEXT.sub(_plain, IN_LATEX.sub(_latex, text))


def _latex(found: re.Match[str]) -> str:
    top, bottom = found[2] or found[3], found[4] or found[5]
    return rf"\frac{{{_top(found[1], top, bottom)}}}{{{bottom}}}"


def _plain(found: re.Match[str]) -> str:
    whole, top, bottom = found.groups()
    return f"{_top(whole, top, bottom)}/{bottom}" if int(top) < int(bottom) else found[0]


def _top(whole: str, top: str, bottom: str) -> int:
    return int(whole.replace(",", "")) * int(bottom) + int(top)
