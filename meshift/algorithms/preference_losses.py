"""The losses of KTO, ORPO and SimPO, each a sum over rows with its formula in the docstring.

They see a reading's outputs and the batch, and know nothing of models, micro-batches or optimizers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from meshift.algorithms.losses import has_pairs, pair_numbers, preference_metrics, preference_sums
from meshift.batch import Batch, Ragged
from meshift.training.engine import LossSums, mean_over_updates
from meshift.training.text_readings import SIDES, CompletionLogprobs, PairLogprobs, num_completion_tokens


@dataclass(frozen=True, kw_only=True)
class KTOLoss:
    """Kahneman-Tversky optimisation, a mean over completions (Ethayarajh et al. 2024, equation 8).

    With d = log p(completion) - log p_ref(completion) and the step's z = `kl_term` [1], which has no gradient:
    w_D (1 - sigmoid(beta (d - z))) where `label` [1] is true, w_U (1 - sigmoid(beta (z - d))) where it is not.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reading: CompletionLogprobs = field(default_factory=CompletionLogprobs)

    def count(self, batch: Batch) -> int:
        """Completions."""
        return len(batch)

    def teaches(self, batch: Batch) -> bool:
        """Always: both sides have a weight."""
        return len(batch) > 0

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        logps = outputs[self.reading.key].values
        ratio = logps - batch["ref_logps"].values.to(logps)
        liked = batch["label"].values.to(logps.device, torch.bool)
        gain = self.beta * (ratio - batch["kl_term"].values.to(logps))
        weights = torch.where(liked, self.desirable_weight, self.undesirable_weight)
        total = (weights * (1 - torch.sigmoid(torch.where(liked, gain, -gain)))).sum()
        sums: dict[str, Tensor] = {}
        for side, mask in zip(SIDES, (liked, ~liked), strict=True):
            sums[f"num_{side}"] = mask.sum()
            sums[side] = (self.beta * ratio.detach())[mask].sum()
            sums[f"{side}_logps"] = logps.detach()[mask].sum()
        return LossSums(total=total, sums=sums)

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Never stopped."""
        del stats
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Rewards (beta * d) and log-probs of those liked (`chosen`) and those not (`rejected`)."""
        means = [{**stats, **side_means(stats)} for stats in updates]
        metrics = {key: mean_over_updates(means, key) for key in ("loss", "grad_norm")}
        for side in SIDES:
            metrics[f"rewards/{side}"] = mean_over_updates(means, side)
            metrics[f"logps/{side}"] = mean_over_updates(means, f"{side}_logps")
        margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics |= {"margin": margin, "rewards/margins": margin}
        return {key: value for key, value in metrics.items() if not math.isnan(value)}  # of a side without rows


def side_means(stats: Mapping[str, float]) -> dict[str, float]:
    """Means over the completions of each side, of sums that were divided by the number of both; NaN of none."""
    means: dict[str, float] = {}
    for side in SIDES:
        share = stats[f"num_{side}"]
        for key in (side, f"{side}_logps"):
            means[key] = stats[key] / share if share > 0 else math.nan
    return means


@dataclass(frozen=True, kw_only=True)
class ReferenceFreeLoss(ABC):
    """A loss of the mean log-probs per token of both completions, a mean over pairs of weight * loss.

    Weights are the key `pair_weight` [1] (default 1).
    """

    beta: float
    reading: PairLogprobs = field(default_factory=PairLogprobs)

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch)

    @abstractmethod
    def per_pair(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The loss of every pair [n], of its mean log-probs [n]."""

    def teaches(self, batch: Batch) -> bool:
        """Where a pair has a weight."""
        return has_pairs(batch)

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        logps = [outputs[key].values for key in self.reading.keys]
        sizes = [num_completion_tokens(batch, side).clamp(min=1).to(logps[0]) for side in SIDES]
        chosen, rejected = (sums / size for sums, size in zip(logps, sizes, strict=True))
        total = (pair_numbers(batch, "pair_weight", 1.0, chosen) * self.per_pair(chosen, rejected)).sum()
        sums = preference_sums(self.beta * chosen.detach(), self.beta * rejected.detach())
        sums |= {f"{side}_logps": value.detach().sum() for side, value in zip(SIDES, logps, strict=True)}
        return LossSums(total=total, sums=sums)

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Never stopped."""
        del stats
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """As DPO's; a reward is beta * the mean log-prob per token."""
        logps = {f"logps/{side}": mean_over_updates(updates, f"{side}_logps") for side in SIDES}
        return preference_metrics(updates) | logps


@dataclass(frozen=True, kw_only=True)
class ORPOLoss(ReferenceFreeLoss):
    """-l_w - beta log sigmoid(log odds_w - log odds_l), odds = p / (1 - p), p = exp(l) (Hong et al. 2024, eq. 6).

    l is the mean log-prob per completion token, of the chosen (w) and the rejected (l) text.
    """

    beta: float = 0.1

    def per_pair(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """See the class."""
        return -chosen - self.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


@dataclass(frozen=True, kw_only=True)
class SimPOLoss(ReferenceFreeLoss):
    """-log sigmoid(beta (l_w - l_l) - gamma), with mean log-probs l per token (Meng et al. 2024, equation 6)."""

    beta: float = 2.0
    gamma: float = 0.5

    def per_pair(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """See the class."""
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.gamma)


def log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)) of log p, which a certain text keeps finite."""
    below = logprob.clamp(max=-1e-6)
    return below - torch.log(-torch.expm1(below))
