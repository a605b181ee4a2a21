"""When an output or a value counts as the expected one.

It knows nothing of where they come from, and calls nothing of theirs but what Python's own types have.
"""

from __future__ import annotations

import math
from typing import Any

TOLERANCE = 1e-6
"""Relative or absolute, for outputs whose expected form is a decimal fraction."""

CONTEST_TOLERANCE = 1e-5
"""Absolute, of CodeContests' own tester."""


def same_output(actual: str, expected: str, *, contest: bool = False) -> bool:
    """Whether both have the same words, whatever white space is between them; decimal fractions to `TOLERANCE`.

    With `contest` as CodeContests' own tester has it: capital letters do not count, and of two numbers of which
    one is written as a fraction the difference is to be below `CONTEST_TOLERANCE`.
    """
    if contest:
        actual, expected = actual.lower(), expected.lower()
    words, others = actual.split(), expected.split()
    if len(words) != len(others):
        return False
    same = _same_number if contest else _same_fraction
    return all(word == other or same(word, other) for word, other in zip(words, others, strict=True))


def _same_number(actual: str, expected: str) -> bool:
    """Integers, however long, are compared digit by digit."""
    if len(actual) > 40 or not any(mark in word for word in (actual, expected) for mark in ".e"):
        return False
    try:
        return abs(float(actual) - float(expected)) < CONTEST_TOLERANCE
    except ValueError:
        return False


def _same_fraction(actual: str, expected: str) -> bool:
    """Only where a fraction is expected: integers, however long, are compared digit by digit."""
    if len(actual) > 40 or not any(mark in expected.lower() for mark in (".", "e")):
        return False
    try:
        value, target = float(actual), float(expected)
    except ValueError:
        return False
    return math.isfinite(target) and abs(value - target) <= TOLERANCE * max(1.0, abs(target))


def same_value(actual: Any, expected: Any) -> bool:
    """Whether a call gave what APPS expects: JSON has no tuples, and wraps a single result in a list at times."""
    value = _listed(actual)
    if _equal(value, expected):
        return True
    return isinstance(expected, list) and len(expected) == 1 and _equal(value, expected[0])


def _listed(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_listed(item) for item in value]
    if isinstance(value, dict):
        return {key: _listed(item) for key, item in value.items()}
    return value


def _equal(value: Any, expected: Any) -> bool:
    if isinstance(value, float) and isinstance(expected, float):
        return value == expected or math.isclose(value, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_equal, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_equal(value[key], expected[key]) for key in value)
    return bool(value == expected)
