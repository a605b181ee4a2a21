"""A reward function as TRL's `GRPOTrainer(reward_funcs=...)` takes it. It knows nothing of Meshift."""

import re
from typing import Any


def format_reward(prompts: list[Any], completions: list[list[dict[str, str]]], **kwargs: Any) -> list[float]:
    """1 where an answer holds one line `#### <number>`, and that is its last."""
    texts = [completion[0]["content"] for completion in completions]
    return [1.0 if re.fullmatch(r"(?:(?!####).)*#### -?\d+\s*", text, re.DOTALL) else 0.0 for text in texts]
