"""Advantages from the comparison of a prompt's completions: what GRPO and the methods made from it share.

It knows nothing of losses.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from meshift.algorithms.advantages import group_mean, group_std, has_signal
from meshift.algorithms.policy_graph import Scored
from meshift.batch import Ragged

EPSILON = 1e-4
"""Added to a standard deviation, so that a group of almost equal scores is not blown up."""


def group_advantages(scored: Scored, scale: Literal["group", "batch", "none"]) -> tuple[Ragged, dict[str, float]]:
    """(r - mean of its group) / (std + EPSILON) at every token of a completion, r being `Scored.rewards`.

    The std is that of the `group`, of the whole `batch` of judged rows, or there is none. A group whose scores are
    equal has an advantage of exactly zero.
    """
    given = (scored.rewards, scored.judged, scored.num_generations)
    centred = torch.where(has_signal(*given) & scored.judged, scored.rewards - group_mean(*given), 0.0)
    if scale == "group":
        centred = centred / (group_std(*given) + EPSILON)
    elif scale == "batch":
        centred = centred / (_batch_std(scored.rewards[scored.judged]) + EPSILON)
    return scored.at_every_token(centred), {}


def _batch_std(values: Tensor) -> Tensor:
    return values.std() if len(values) > 1 else values.new_zeros(())
