"""Weights of tokens that older weights drew: what the trainer gives them over what the sampler gave them.

It knows nothing of why the two differ (updates in between, other kernels), nor of any loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meshift.algorithms.advantages import LARGEST_LOG_RATIO
from meshift.batch import Batch, Ragged
from meshift.config.policy_sections import PolicyConfig
from meshift.config.sections import PPOConfig
from meshift.training.engine import mean_over_updates

BEHAVIOUR = ("behaviour_ratio", "behaviour_weight", "behaviour_weight_square", "behaviour_truncated")
"""The sums that an update's statistics have of a correction."""
LARGEST_LOG = 80.0
"""Log-ratios above this are this in statistics: its exponential squared is still a number in fp64."""


@dataclass(frozen=True, kw_only=True)
class Correction:
    """w = min(pi_prox / pi_behaviour, cap), without gradient; `cap` None: not truncated.

    pi_behaviour drew the tokens, and pi_prox are the weights at the start of the step. A loss whose tokens are
    weighted by w is, up to the truncation, that of tokens drawn by pi_prox. `level` is what the ratio is of:
    `token`: of each token, as decoupled PPO has it (Hilton et al. 2022, equation 3; Fu et al. 2025, AReaL, arXiv
    2505.24298, equation 5) and, with a cap, truncated importance sampling (Ionides 2008; Yao et al. 2025);
    `sequence`: of the whole completion, the same at each of its tokens: without a cap the expectation is exact,
    and its variance grows with the length.
    """

    level: Literal["token", "sequence"] = "token"
    cap: float | None = None

    def log_ratio(self, proximal: Tensor, behaviour: Tensor, lengths: Tensor) -> Tensor:
        """Of every token [tokens], from both policies' log-probs [tokens] of completions of `lengths`."""
        apart = (proximal - behaviour).detach()
        if self.level == "token":
            return apart
        return Ragged(apart, lengths).sum_rows().repeat_interleave(lengths.to(apart.device))

    def weights(self, log_ratio: Tensor) -> Tensor:
        """w of every token [tokens]; without a cap at most exp(20): a gradient times that has a norm in fp32."""
        return torch.exp(log_ratio.clamp(max=LARGEST_LOG_RATIO if self.cap is None else math.log(self.cap)))

    def sums(self, log_ratio: Tensor, counted: Tensor) -> dict[str, Tensor]:
        """What `off_policy_metrics` are made of, summed over tokens; `counted` [tokens] is 1 or 0."""
        logs = log_ratio.double().clamp(max=LARGEST_LOG)
        weights = self.weights(logs)
        beyond = torch.zeros_like(logs) if self.cap is None else (logs > math.log(self.cap)).double()
        found = (torch.exp(logs), weights, weights.square(), beyond)
        return {key: (counted.double() * value).sum() for key, value in zip(BEHAVIOUR, found, strict=True)}


def correction_of(keys: PPOConfig | PolicyConfig) -> Correction | None:
    """What an objective's keys ask for."""
    level = keys.importance_correction
    return None if level == "none" else Correction(level=level, cap=keys.importance_cap)


def paid_logprobs(batch: Batch) -> Ragged:
    """What KL in the reward is of: the proximal policy, where a correction makes the loss that of it."""
    return batch["old_logprobs" if "old_logprobs" in batch else "logprobs"]


def off_policy_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """`off_policy/*` from the means per token of a step's updates; nothing where there was no correction.

    The effective sample size is a share of the tokens: mean(w)^2 / mean(w^2).
    """
    if any(key not in updates[0] for key in BEHAVIOUR):
        return {}
    ratio, weight, square, truncated = (mean_over_updates(updates, key) for key in BEHAVIOUR)
    return {
        "off_policy/ratio_mean": ratio,
        "off_policy/truncated_fraction": truncated,
        "off_policy/ess": weight**2 / square if square > 0 else 0.0,
    }
