"""The losses of the critic-free methods: a surrogate per token, and how tokens are added up.

They see a reading's outputs and the batch, and know nothing of models, micro-batches, or of where advantages come
from. Batch keys besides those of the reading: `logprobs` and `advantages` [completion], `trained` [1] (whether a
completion is learned from), with a KL term `ref_logprobs`, with `old="recomputed"` `old_logprobs` [completion].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from meshift.algorithms.advantages import exp_of_ratio, kl_estimate
from meshift.algorithms.off_policy import BEHAVIOUR, Correction, off_policy_metrics
from meshift.batch import Batch, Ragged
from meshift.config.policy_sections import Aggregation, Estimator
from meshift.config.runs import OldLogprobs
from meshift.training.engine import LossSums, mean_over_updates
from meshift.training.readings import TokenLogprobs

TOKEN_MEANS = ("ppo_kl", "pg_clipfrac_low", "pg_clipfrac_high", "entropy", "logprob_diff_mean")


@dataclass(frozen=True, kw_only=True)
class Ratios:
    """Importance of every completion token: `weight` [tokens] and its logarithm, both with gradient."""

    log: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """A loss per token [tokens], and where a clip decided: `low` and `high` [tokens], bool."""

    per_token: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyGradientLoss(ABC):
    """surrogate + kl_coef * KL - entropy_coef * entropy, added up over the mini-batch's N trained completions.

    With T_i tokens in completion i, aggregation is by
    `token`: 1 / (sum of T_i) * sum over i, t (DAPO, equation 8);
    `sequence`: 1 / N * sum over i of 1 / T_i * sum over t (DeepSeekMath, equation 3);
    `constant`: 1 / (N * max_completion_length) * sum over i, t (Dr. GRPO, section 3.3).

    KL is estimated per token from the tokens that were drawn. The expected gradient of k1 is zero, so k1 lends its
    value only: its gradient is that of k2, which is the gradient of KL(policy || reference).

    `old` says what a token's importance ratio is against: the log-prob it was `sampled` with, the trainer's own
    before the step's updates (`recomputed`), or, where a step makes one update and so both are one, the `current`.
    With a `correction` the latter two are the proximal policy of decoupled PPO: surrogate and KL, which are means
    over drawn tokens, are weighted as if that policy had drawn them.

    Completions that are not trained count as unmoved: whatever their log-probs are, they are in no sum.
    """

    reading: TokenLogprobs
    aggregation: Aggregation
    max_completion_length: int
    old: OldLogprobs = "sampled"
    kl_coef: float = 0.0
    kl_estimator: Estimator = "k3"
    entropy_coef: float = 0.0
    max_importance_ratio: float | None = None
    max_update_kl: float | None = None
    correction: Correction | None = None

    @abstractmethod
    def surrogate(self, logprobs: Tensor, ratios: Ratios, advantages: Tensor) -> Surrogate:
        """The method's own loss per token."""

    def ratios(self, log_ratio: Ragged) -> Ratios:
        """The importance of every token, from new minus old log-probs."""
        return Ratios(log=log_ratio.values, weight=exp_of_ratio(log_ratio.values))

    def count(self, batch: Batch) -> int:
        """What the mini-batch's sum is divided by."""
        trained = batch["trained"].values.long()
        if self.aggregation == "token":
            return int((trained * batch["completion_lengths"].values).sum())
        return int(trained.sum()) * (self.max_completion_length if self.aggregation == "constant" else 1)

    def teaches(self, batch: Batch) -> bool:
        """Where a completion is trained that has an advantage, or any is and KL or entropy counts."""
        trained = batch["trained"].values.bool()
        if self.kl_coef > 0 or self.entropy_coef > 0:
            return bool(trained.any())
        return bool(
            batch["advantages"].values[trained.repeat_interleave(batch["completion_lengths"].values)].any()
        )

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        read, lengths = outputs[self.reading.key].values, batch["completion_lengths"].values
        drawn = batch["logprobs"].values.to(read)
        is_trained = batch["trained"].values.bool().repeat_interleave(lengths).to(read.device)
        new = torch.where(is_trained, read, drawn)
        old = self._old(new, batch)
        trained, weights = is_trained.to(new), self._weights(lengths).to(new)
        ratios = self.ratios(Ragged(new - old, lengths))
        surrogate = self.surrogate(new, ratios, batch["advantages"].values.to(new))
        entropy = outputs["entropy"].values if "entropy" in outputs else torch.zeros_like(new)
        kl = self._kl(new, batch)
        pg_loss, off_policy = surrogate.per_token, dict[str, Tensor]()
        if self.correction is not None:
            log_ratio = self.correction.log_ratio(old, drawn, lengths)
            importance = self.correction.weights(log_ratio)
            pg_loss, kl = importance * pg_loss, importance * kl
            off_policy = self.correction.sums(torch.where(is_trained, log_ratio, 0.0), trained)
        per_token = pg_loss + self.kl_coef * kl - self.entropy_coef * entropy
        total = torch.where(is_trained, weights * per_token, 0.0).sum()
        apart = (read - drawn).detach().abs()
        token_means = {
            "ppo_kl": old - new,
            "pg_clipfrac_low": surrogate.low,
            "pg_clipfrac_high": surrogate.high,
            "entropy": entropy,
            "ratio": ratios.weight,
            "logprob_diff_mean": apart,
        }
        of_sums = {**token_means, "pg_loss": weights * pg_loss, "kl_loss": weights * kl}
        sums = {
            **{key: torch.where(is_trained, value, 0).detach().sum() for key, value in of_sums.items()},
            "num_tokens": trained.sum(),
            **off_policy,
        }
        return LossSums(total=total, sums=sums, maxima={"logprob_diff_max": apart.max()})

    def _old(self, new: Tensor, batch: Batch) -> Tensor:
        if self.old == "current":
            return new.detach()
        return batch["logprobs" if self.old == "sampled" else "old_logprobs"].values.to(new)

    def _weights(self, lengths: Tensor) -> Tensor:
        """The share of each token in the sum, [tokens]."""
        per_row = 1.0 / lengths.double() if self.aggregation == "sequence" else torch.ones(len(lengths))
        return per_row.repeat_interleave(lengths)

    def _kl(self, new: Tensor, batch: Batch) -> Tensor:
        if self.kl_coef == 0:
            return torch.zeros_like(new)
        ref = batch["ref_logprobs"].values.to(new)
        if self.kl_estimator != "k1":
            return kl_estimate(new, ref, self.kl_estimator)
        pull = kl_estimate(new, ref, "k2")
        return pull + (kl_estimate(new, ref, "k1") - pull).detach()

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Why the policy must not move further on this batch."""
        ratio, kl = _token_mean(stats, "ratio"), _token_mean(stats, "ppo_kl")
        if self.max_importance_ratio is not None and ratio > self.max_importance_ratio:
            return f"mean importance ratio {ratio:.2f} is above {self.max_importance_ratio}"
        if self.max_update_kl is not None and kl > self.max_update_kl:
            return f"policy KL {kl:.4f} per token is above {self.max_update_kl}"
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """`actor/*`; and `sync/*`, the sampler against the trainer, from the first update, before any change."""
        of_tokens = [key for key in (*TOKEN_MEANS, *BEHAVIOUR) if key in updates[0]]
        means = [{**stats, **{key: _token_mean(stats, key) for key in of_tokens}} for stats in updates]
        keys = ("pg_loss", *TOKEN_MEANS[:-1], "grad_norm", *(("kl_loss",) if self.kl_coef > 0 else ()))
        metrics = {f"actor/{key}": mean_over_updates(means, key) for key in keys}
        metrics["actor/pg_clipfrac"] = metrics["actor/pg_clipfrac_low"] + metrics["actor/pg_clipfrac_high"]
        metrics["actor/early_stop"] = updates[-1].get("early_stop", 0.0)
        metrics["sync/logprob_diff_mean"] = means[0]["logprob_diff_mean"]
        metrics["sync/logprob_diff_max"] = means[0]["logprob_diff_max"]
        return metrics | off_policy_metrics(means)


def _token_mean(stats: Mapping[str, float], key: str) -> float:
    """The engine has divided both sums by the loss's count, which need not be tokens."""
    return stats[key] / stats["num_tokens"] if stats["num_tokens"] > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class ClippedLoss(PolicyGradientLoss):
    """max(-A * ratio, -A * clip(ratio, 1 - low, 1 + high)) (Schulman et al. 2017, equation 7).

    With a dual clip c, at most -A * c where A < 0 (Ye et al. 2020).
    `importance` is what ratio is of, with d_t = new - old log-prob:
    `token`: exp(d_t);
    `mean`: exp(mean of d over the completion), the same at each of its tokens (GSPO, equation 7);
    `sequence`: exp(sum of d over the completion), which is the ratio of whole completions.
    """

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.2
    dual_clip: float | None = None
    importance: Literal["token", "mean", "sequence"] = "token"

    def ratios(self, log_ratio: Ragged) -> Ratios:
        """See the class."""
        if self.importance == "token":
            return super().ratios(log_ratio)
        lengths = log_ratio.lengths.to(log_ratio.values.device)
        per_row = log_ratio.sum_rows()
        per_row = per_row / lengths if self.importance == "mean" else per_row
        log = per_row.repeat_interleave(lengths)
        return Ratios(log=log, weight=exp_of_ratio(log))

    def surrogate(self, logprobs: Tensor, ratios: Ratios, advantages: Tensor) -> Surrogate:
        """See the class."""
        del logprobs  # the gradient comes through the ratio
        low, high = 1.0 - self.clip_ratio_low, 1.0 + self.clip_ratio_high
        ratio = ratios.weight
        per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high))
        if self.dual_clip is not None:
            bounded = torch.minimum(per_token, -advantages * self.dual_clip)
            per_token = torch.where(advantages < 0, bounded, per_token)
        return Surrogate(
            per_token=per_token,
            low=(advantages < 0) & (ratio < low),
            high=(advantages > 0) & (ratio > high),
        )


@dataclass(frozen=True, kw_only=True)
class LikelihoodLoss(PolicyGradientLoss):
    """-A * logprob: with A = 1 maximum likelihood of trained completions (Dong et al. 2023, algorithm 1)."""

    def surrogate(self, logprobs: Tensor, ratios: Ratios, advantages: Tensor) -> Surrogate:
        """See the class."""
        nowhere = torch.zeros_like(ratios.weight, dtype=torch.bool)
        return Surrogate(per_token=-advantages * logprobs, low=nowhere, high=nowhere)


@dataclass(frozen=True, kw_only=True)
class ClippedWeightLoss(PolicyGradientLoss):
    """-stop_gradient(clip(ratio, 1 - low, 1 + high)) * A * logprob (MiniMax-M1, equations 4 and 5).

    A clipped token keeps its gradient, with a bounded weight.
    """

    clip_ratio_low: float = 1.0
    clip_ratio_high: float = 0.28

    def surrogate(self, logprobs: Tensor, ratios: Ratios, advantages: Tensor) -> Surrogate:
        """See the class."""
        low, high = 1.0 - self.clip_ratio_low, 1.0 + self.clip_ratio_high
        ratio = ratios.weight.detach()
        per_token = -ratio.clamp(low, high) * advantages * logprobs
        return Surrogate(per_token=per_token, low=ratio < low, high=ratio > high)
