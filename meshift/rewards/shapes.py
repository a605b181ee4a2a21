"""The reward functions `format` and `length`: what a completion looks like, not what it says.

They know nothing of processes: a regular expression that takes hours for some text is stopped from outside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from meshift.config.reward_kwargs import THINK_THEN_ANSWER, LengthConfig


def matches(
    solution_str: str,
    pattern: str = THINK_THEN_ANSWER,
    match: Literal["whole", "anywhere", "count"] = "whole",
    most: int = 1,
) -> float:
    """1 or 0, or with `count` min(parts that match, most) / most; see `FormatConfig`."""
    found = re.compile(pattern, re.DOTALL)
    if match == "whole":
        return float(found.fullmatch(solution_str) is not None)
    if match == "anywhere":
        return float(found.search(solution_str) is not None)
    count = sum(1 for _, _ in zip(range(most), found.finditer(solution_str), strict=False))
    return count / most


class Length:
    """0 for lengths from `least` to `most`, falling to -1 at none and at `most + buffer`, and no lower.

    With `most` and `buffer` it is DAPO's soft overlong punishment (Yu et al. 2025, eq. 13).
    """

    def __init__(self, config: LengthConfig) -> None:
        self.config = config

    def __call__(self, completions: Sequence[Any], completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """One number per completion, from -1 to 0."""
        return [-self.cost(self._count(c, ids)) for c, ids in zip(completions, completion_ids, strict=True)]

    def _count(self, completion: Any, ids: Sequence[int]) -> int:
        if self.config.unit == "tokens":
            return len(ids)
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        return len(text.split()) if self.config.unit == "words" else len(text)

    def cost(self, length: int) -> float:
        """From 0 to 1."""
        config = self.config
        if length < config.least:
            return 1 - length / config.least
        if config.most is None or length <= config.most:
            return 0.0
        return min(1.0, (length - config.most) / config.buffer) if config.buffer else 1.0
