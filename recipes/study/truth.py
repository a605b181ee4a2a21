"""The reward that is known to be true in this study: VADER's sentiment of the completion alone, from -1 to 1.

It labels preferences and judges policies. No policy and no reward model sees it otherwise. As a reward function it
has TRL's signature.
"""

from __future__ import annotations

from meshift.evaluation.judges import vader


def true_reward(completions: list[str], **columns: object) -> list[float]:
    """One number a completion."""
    return vader(completions)
