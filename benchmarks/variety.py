"""A cheap reward for the RL steps, in TRL's signature, which both sides call: it must cost next to nothing."""

from __future__ import annotations

from typing import Any


def word_variety(completions: list[Any], **columns: Any) -> list[float]:
    """The share of a completion's words that are different."""
    del columns
    return [_variety(c if isinstance(c, str) else c[0]["content"]) for c in completions]


def _variety(text: str) -> float:
    words = text.split()
    return len(set(words)) / max(1, len(words))
