"""The number that an answer to a word problem comes to, and whether it is the right one.

It reads text alone. It knows nothing of files or models.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from meshift.rewards.mixed_numbers import PART, as_fractions

HEADING = r"[^\w\n]{0,12}(?i:step|part|case|stage|phase|section)\b"  # Markdown's, of a solution in several parts
LINE = r"[^\n]*(?:\n[^\w#]*\d[^\n]*)?"  # the line behind the mark, and one that a number begins
MARKED = re.compile(rf"####(?!{HEADING})\s*({LINE})")
BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
DIGITS = re.compile(rf"\\[dtc]?frac{PART}{PART}")  # \frac12 too
SPACED = re.compile(r"\\[$%]|\{,\}|\\!|\\,|,(?=\\!)")  # 1{,}000, 1,\!000 and 1\,000 are 1000
NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?")  # 2-18 ends in 18
DIVIDED = re.compile(rf"({NUMBER.pattern})\s*/\s*({NUMBER.pattern})")
CURRENCIES = str.maketrans("", "", "$€£%")


def final_number(text: str) -> Decimal | None:
    """The answer a text says it has: of its last `####` or `\\boxed{}` with a number behind or in it, else its
    last number.

    Where there are marks, and none has a number, there is no answer: nothing is taken from elsewhere instead. A
    `####` before a heading of the solution (`#### Step 2`) marks no answer.
    """
    marks = sorted((found for mark in (MARKED, BOXED) for found in mark.finditer(text)), key=re.Match.start)
    if marks:
        marked = [number for found in marks if (number := first_number(found[1])) is not None]
        return marked[-1] if marked else None
    numbers = NUMBER.findall(SPACED.sub("", text).translate(CURRENCIES))
    return _decimal(numbers[-1]) if numbers else None


def first_number(text: str) -> Decimal | None:
    """The number a marked answer or a truth holds: its first, or the quotient (`1/2`) or mixed number (`1 1/2`)
    that begins with it."""
    text = as_fractions(SPACED.sub("", text).translate(CURRENCIES))
    text = FRACTION.sub(r"\1/\2", DIGITS.sub(_quotient, text))
    number = NUMBER.search(text)
    if number is None:
        return None
    divided = DIVIDED.match(text, number.start())
    if divided is None:
        return _decimal(number[0])
    top, bottom = _decimal(divided[1]), _decimal(divided[2])
    return top / bottom if top is not None and bottom else None


def _quotient(fraction: re.Match[str]) -> str:
    return f"{fraction[1] or fraction[2]}/{fraction[3] or fraction[4]}"


def _decimal(number: str) -> Decimal | None:
    try:
        return Decimal(number.replace(",", ""))
    except InvalidOperation:
        return None


def is_right(text: str, truth: str) -> bool:
    """Whether the answer in `text` equals the number `truth`, exactly: 18, $18.00 and 18.0 are one number."""
    return (found := final_number(text)) is not None and found == first_number(truth)
