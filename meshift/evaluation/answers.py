"""The number that an answer to a word problem comes to, and whether it is the right one.

It reads text alone. It knows nothing of files or models.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

MARKED = re.compile(r"####\s*([^\n]*)")
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?")
CURRENCIES = str.maketrans("", "", "$€£%")


def final_number(text: str) -> Decimal | None:
    """The answer a text says it has: after the last `####`, else in the last `\\boxed{}`, else its last number.

    A marked answer that holds no number is none: nothing before it is taken instead.
    """
    for mark in (MARKED, BOXED):
        found = mark.findall(text)
        if found:
            return _number(found[-1], first=True)
    return _number(text, first=False)


def _number(text: str, *, first: bool) -> Decimal | None:
    numbers = NUMBER.findall(text.translate(CURRENCIES))
    if not numbers:
        return None
    try:
        return Decimal(numbers[0 if first else -1].replace(",", ""))
    except InvalidOperation:
        return None


def is_right(text: str, truth: str) -> bool:
    """Whether the answer in `text` equals the number `truth`, exactly: 18, $18.00 and 18.0 are one number."""
    return (found := final_number(text)) is not None and found == _number(truth, first=True)
