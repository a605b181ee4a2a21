"""The reward function `maths`: whether a completion's answer equals the right one, by `math-verify`.

It is imported where that extra is installed, and runs in a process of its own, which is killed if it takes too
long: symbolic algebra may. It knows nothing of processes.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from math_verify import parse, verify

from meshift.rewards.mixed_numbers import as_fractions

END_OF_THOUGHT = "</think>"
GSM8K_MARK = "####"
BOX = "\\boxed{"
# Behind a box, before another that belongs to the same answer.
JOINED = re.compile(r"\}[\s$\\()\[\]]*(?:,|,?\s*\b(?:and|or)\b)[^.}]{0,20}$")
DOLLAR = re.compile(r"(?<!\\)\\\$")  # a currency; without the backslash it is a mark of mathematics


def maths(solution_str: str, ground_truth: Any, boxed_only: bool = False) -> float:
    """1 where the completion's last answer is the right one as a mathematical object, else 0.

    `ground_truth` is a number or LaTeX, with or without `$` and `\\boxed`, or a solution that ends as GSM8K's do
    (`#### 42`) or in a box. Raises `ValueError` where no expression can be read in it.
    """
    logging.getLogger("math_verify").setLevel(
        logging.ERROR
    )  # it warns of what is done here: no time limit of its own
    right = parse(as_fractions(boxed_truth(ground_truth)), parsing_timeout=None)
    if not right:
        raise ValueError(f"the right answer {str(ground_truth)[:60]!r} holds no expression that can be read")
    text = DOLLAR.sub("", solution_str.rpartition(END_OF_THOUGHT)[2])
    before, found, after = text.rpartition(BOX)
    if boxed_only:
        return float(_is_right(right, found + after if found else ""))
    if _is_right(right, text):
        return 1.0
    # Of several boxes that nothing marks as mathematics, math-verify makes a set, whatever is said between them.
    is_last = BOX in before and not JOINED.search(before)
    return float(is_last and _is_right(right, found + after))


def _is_right(right: list[Any], text: str) -> bool:
    return bool(verify(right, parse(as_fractions(text), parsing_timeout=None), timeout_seconds=None))


def boxed_truth(ground_truth: Any) -> str:
    """The right answer as it is parsed best: in a box, unless it is marked as mathematics already."""
    text = DOLLAR.sub("", str(ground_truth)).strip()
    if GSM8K_MARK in text:
        text = text.rpartition(GSM8K_MARK)[2].strip()
    if BOX in text:
        return BOX + text.rpartition(BOX)[2]
    return text if "$" in text else f"{BOX}{text}}}"
