"""The losses of the algorithms, each a sum over units with its formula in the docstring.

They see a reading's outputs and the batch, and know nothing of models, micro-batches or optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from meshift.batch import Batch, Ragged
from meshift.training.engine import LossSums, mean_over_updates
from meshift.training.readings import PairScores, TokenLogprobs, TokenValues


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), per completion token.

    ratio = exp(new_logprob - logprob), with `logprobs` those of the sampling itself;
    loss = max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high)); with a dual clip c, at most -A * c where A < 0
    (Ye et al. 2020); minus entropy_coef * entropy. The mean is over the mini-batch's tokens.
    """

    reading: TokenLogprobs
    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    max_importance_ratio: float | None = None
    max_update_kl: float | None = None

    def count(self, batch: Batch) -> int:
        """Completion tokens."""
        return int(batch["advantages"].values.numel())

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        new = outputs[self.reading.key].values
        old = batch["logprobs"].values.to(new)
        advantages = batch["advantages"].values.to(new)
        log_ratio = new - old
        ratio = torch.exp(log_ratio)
        clipped = ratio.clamp(1.0 - self.clip_ratio_low, 1.0 + self.clip_ratio_high)
        per_token = torch.maximum(-advantages * ratio, -advantages * clipped)
        if self.dual_clip is not None:
            bounded = torch.minimum(per_token, -advantages * self.dual_clip)
            per_token = torch.where(advantages < 0, bounded, per_token)
        total = per_token.sum()
        entropy = outputs["entropy"].values if "entropy" in outputs else torch.zeros_like(new)
        if self.entropy_coef > 0:
            total = total - self.entropy_coef * entropy.sum()
        beyond = -advantages * clipped > -advantages * ratio
        sums = {
            "pg_loss": per_token.detach().sum(),
            "ppo_kl": -log_ratio.detach().sum(),
            "pg_clipfrac": beyond.sum(),
            "entropy": entropy.detach().sum(),
            "ratio": ratio.detach().sum(),
            "logprob_diff_mean": log_ratio.detach().abs().sum(),
        }
        return LossSums(total=total, sums=sums, maxima={"logprob_diff_max": log_ratio.detach().abs().max()})

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Why the policy must not move further on this batch."""
        if self.max_importance_ratio is not None and stats["ratio"] > self.max_importance_ratio:
            return f"mean importance ratio {stats['ratio']:.2f} is above {self.max_importance_ratio}"
        if self.max_update_kl is not None and stats["ppo_kl"] > self.max_update_kl:
            return f"policy KL {stats['ppo_kl']:.4f} per token is above {self.max_update_kl}"
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """`actor/*`; and `sync/*`, the sampler against the trainer, from the first update, before any change."""
        keys = ("pg_loss", "ppo_kl", "pg_clipfrac", "entropy", "grad_norm")
        metrics = {f"actor/{key}": mean_over_updates(updates, key) for key in keys}
        metrics["actor/early_stop"] = updates[-1].get("early_stop", 0.0)
        metrics["sync/logprob_diff_mean"] = updates[0]["logprob_diff_mean"]
        metrics["sync/logprob_diff_max"] = updates[0]["logprob_diff_max"]
        return metrics


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Clipped squared error of the critic, per completion token, in the critic's (normalised) units.

    0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2).
    """

    cliprange_value: float | None = 0.2
    reading: TokenValues = field(default_factory=lambda: TokenValues(key="new_values"))

    def count(self, batch: Batch) -> int:
        """Completion tokens."""
        return int(batch["returns"].values.numel())

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        new = outputs[self.reading.key].drop_last().values
        old = batch["values"].drop_last().values.to(new)
        returns = batch["returns"].values.to(new)
        error = (new - returns).square()
        clipfrac = torch.zeros((), device=new.device)
        if self.cliprange_value is not None:
            clipped = old + (new - old).clamp(-self.cliprange_value, self.cliprange_value)
            clipped_error = (clipped - returns).square()
            clipfrac = (clipped_error > error).sum()
            error = torch.maximum(error, clipped_error)
        total = 0.5 * error.sum()
        return LossSums(total=total, sums={"vf_loss": total.detach(), "vf_clipfrac": clipfrac})

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """The critic is never stopped."""
        del stats
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """`critic/*`."""
        return {
            f"critic/{key}": mean_over_updates(updates, key) for key in ("vf_loss", "vf_clipfrac", "grad_norm")
        }


@dataclass(frozen=True, kw_only=True)
class PairwiseLoss:
    """Bradley-Terry: -log sigmoid(score(chosen) - score(rejected)), a mean over pairs."""

    reading: PairScores = field(default_factory=PairScores)

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch)

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        del batch  # everything is in the scores
        chosen, rejected = outputs["chosen_scores"].values, outputs["rejected_scores"].values
        margin = chosen - rejected
        total = -F.logsigmoid(margin).sum()
        fixed = margin.detach()
        sums = {
            "accuracy": (fixed > 0).sum(),
            "margin": fixed.sum(),
            "chosen": chosen.detach().sum(),
            "rejected": rejected.detach().sum(),
        }
        return LossSums(total=total, sums=sums)

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Never stopped."""
        del stats
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Loss, accuracy and margin under the field's names."""
        accuracy, margin = mean_over_updates(updates, "accuracy"), mean_over_updates(updates, "margin")
        return {
            "loss": mean_over_updates(updates, "loss"),
            "accuracy": accuracy,
            "margin": margin,
            "rewards/accuracies": accuracy,
            "rewards/margins": margin,
            "rewards/chosen": mean_over_updates(updates, "chosen"),
            "rewards/rejected": mean_over_updates(updates, "rejected"),
            "grad_norm": mean_over_updates(updates, "grad_norm"),
        }
