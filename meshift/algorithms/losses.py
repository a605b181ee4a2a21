"""The losses of the algorithms, each a sum over units with its formula in the docstring.

They see a reading's outputs and the batch, and know nothing of models, micro-batches or optimizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from meshift.algorithms.advantages import exp_of_ratio
from meshift.algorithms.off_policy import Correction, off_policy_metrics
from meshift.batch import Batch, Ragged
from meshift.config.runs import OldLogprobs
from meshift.training.engine import LossSums, mean_over_updates
from meshift.training.readings import LogprobsAndValues, TokenLogprobs, TokenValues
from meshift.training.text_readings import (
    SIDES,
    PairLogprobs,
    PairScores,
    TrainedTokens,
    num_completion_tokens,
    num_trained_tokens,
)


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, equation 7), per completion token.

    ratio = exp(new_logprob - logprob), with `logprobs` those of the sampling itself, or with `old="recomputed"`
    the trainer's own before the step's updates, `old_logprobs`. With a `correction` the loss of a token is
    weighted by the latter over the former (decoupled PPO, `off_policy.py`);
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
    old: OldLogprobs = "sampled"
    correction: Correction | None = None

    def count(self, batch: Batch) -> int:
        """Completion tokens."""
        return int(batch["advantages"].values.numel())

    def teaches(self, batch: Batch) -> bool:
        """Where an advantage is not zero, or entropy counts."""
        return self.entropy_coef > 0 or bool(batch["advantages"].values.any())

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        new = outputs[self.reading.key].values
        drawn = batch["logprobs"].values.to(new)
        old = drawn if self.old == "sampled" else batch["old_logprobs"].values.to(new)
        advantages = batch["advantages"].values.to(new)
        log_ratio, apart = new - old, (new - drawn).detach().abs()
        ratio = exp_of_ratio(log_ratio)
        clipped = ratio.clamp(1.0 - self.clip_ratio_low, 1.0 + self.clip_ratio_high)
        per_token = torch.maximum(-advantages * ratio, -advantages * clipped)
        if self.dual_clip is not None:
            bounded = torch.minimum(per_token, -advantages * self.dual_clip)
            per_token = torch.where(advantages < 0, bounded, per_token)
        off_policy: dict[str, Tensor] = {}
        if self.correction is not None:
            behind = self.correction.log_ratio(old, drawn, batch["advantages"].lengths)
            per_token = self.correction.weights(behind) * per_token
            off_policy = self.correction.sums(behind, torch.ones_like(behind))
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
            "logprob_diff_mean": apart.sum(),
            **off_policy,
        }
        return LossSums(total=total, sums=sums, maxima={"logprob_diff_max": apart.max()})

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
        return metrics | off_policy_metrics(updates)


@dataclass(frozen=True, kw_only=True)
class ValueLoss:
    """Clipped squared error of the critic, per completion token, in the critic's (normalised) units.

    0.5 * max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2). `values` and `returns` are the batch's keys, and
    `name` is the critic's in the metrics.
    """

    cliprange_value: float | None = 0.2
    values: str = "values"
    returns: str = "returns"
    name: str = "critic"
    reading: TokenValues = field(default_factory=lambda: TokenValues(key="new_values"))

    def count(self, batch: Batch) -> int:
        """Completion tokens."""
        return int(batch[self.returns].values.numel())

    def teaches(self, batch: Batch) -> bool:
        """Always: every token has a return."""
        return self.count(batch) > 0

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        new = outputs[self.reading.key].drop_last().values
        old = batch[self.values].drop_last().values.to(new)
        returns = batch[self.returns].values.to(new)
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
            f"{self.name}/{key}": mean_over_updates(updates, key)
            for key in ("vf_loss", "vf_clipfrac", "grad_norm")
        }


@dataclass(frozen=True, kw_only=True)
class PolicyAndValueLoss:
    """Of a policy and a critic with one trunk: policy loss + vf_coef * value loss, means over the same tokens."""

    policy: PolicyLoss
    value: ValueLoss
    vf_coef: float = 0.1

    @property
    def reading(self) -> LogprobsAndValues:
        """Both in one pass."""
        return LogprobsAndValues(logprobs=self.policy.reading, values=self.value.reading)

    def count(self, batch: Batch) -> int:
        """Completion tokens."""
        return self.policy.count(batch)

    def teaches(self, batch: Batch) -> bool:
        """Where either does."""
        return self.policy.teaches(batch) or (self.vf_coef > 0 and self.value.teaches(batch))

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        policy, value = self.policy(outputs, batch), self.value(outputs, batch)
        total = policy.total + self.vf_coef * value.total
        return LossSums(total=total, sums={**policy.sums, **value.sums}, maxima=policy.maxima)

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """The policy's."""
        return self.policy.stop_reason(stats)

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Those of both; the gradient's norm is of both together."""
        return {**self.value.summarise(updates), **self.policy.summarise(updates)}


@dataclass(frozen=True, kw_only=True)
class TokenCrossEntropy:
    """Maximum likelihood: -log p(token | all before it), a mean over the mini-batch's trained tokens."""

    reading: TrainedTokens = field(default_factory=TrainedTokens)

    def count(self, batch: Batch) -> int:
        """Trained tokens."""
        return int(num_trained_tokens(batch).sum())

    def teaches(self, batch: Batch) -> bool:
        """Where a token is trained on."""
        return self.count(batch) > 0

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        del batch  # everything is in the log-probs
        return LossSums(total=-outputs["logprobs"].values.sum(), sums={"correct": outputs["correct"].values.sum()})

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Never stopped."""
        del stats
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Loss in nats per token, and the share of trained tokens that were the likeliest."""
        return {
            "loss": mean_over_updates(updates, "loss"),
            "mean_token_accuracy": mean_over_updates(updates, "correct"),
            "grad_norm": mean_over_updates(updates, "grad_norm"),
        }


@dataclass(frozen=True, kw_only=True)
class PairwiseLoss:
    """Bradley-Terry with margins, weights and centring, a mean over pairs.

    weight * (-log sigmoid(score(chosen) - score(rejected) - required) + c * (score(chosen) + score(rejected))^2).
    The required margin is Touvron et al. 2023 (Llama 2, equation 2), the centring with coefficient c
    Eisenstein et al. 2023 (equation 2). Keys `required_margin` [1] (default 0) and `pair_weight` [1] (default 1).
    """

    center_rewards_coefficient: float = 0.0
    reading: PairScores = field(default_factory=PairScores)

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch)

    def teaches(self, batch: Batch) -> bool:
        """Where a pair has a weight."""
        return has_pairs(batch)

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        chosen, rejected = outputs["chosen_scores"].values, outputs["rejected_scores"].values
        required = pair_numbers(batch, "required_margin", 0.0, chosen)
        per_pair = -F.logsigmoid(chosen - rejected - required)
        if self.center_rewards_coefficient > 0:
            per_pair = per_pair + self.center_rewards_coefficient * (chosen + rejected).square()
        total = (pair_numbers(batch, "pair_weight", 1.0, chosen) * per_pair).sum()
        return LossSums(total=total, sums=preference_sums(chosen.detach(), rejected.detach()))

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Never stopped."""
        del stats
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Loss, accuracy and margin under the field's names."""
        return preference_metrics(updates)


@dataclass(frozen=True, kw_only=True)
class DPOLoss:
    """Direct preference optimisation, a mean over pairs of weight * loss.

    With d = log p(completion) - log p_ref(completion), a sum over its tokens, of chosen (w) and rejected (l):
    sigmoid: -(1 - s) log sigmoid(beta (d_w - d_l)) - s log sigmoid(-beta (d_w - d_l)), Rafailov et al. 2023,
    equation 7, with label smoothing s as in cDPO (Mitchell 2023, equation 3), or with s of each pair, the key
    `flip_probability` [1];
    ipo: (d_w / T_w - d_l / T_l - 1 / (2 beta))^2, Azar et al. 2023, equation 17, with beta for its tau and with
    log-ratios per completion token (T tokens), as TRL has it, so that a config from there means the same.
    The reward of a completion is beta * d, of either loss. Weights are the key `pair_weight` [1] (default 1).
    """

    beta: float = 0.1
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = 0.0
    reading: PairLogprobs = field(default_factory=PairLogprobs)

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch)

    def teaches(self, batch: Batch) -> bool:
        """Where a pair has a weight."""
        return has_pairs(batch)

    def __call__(self, outputs: Mapping[str, Ragged], batch: Batch) -> LossSums:
        """See the class."""
        chosen, rejected = (outputs[key].values for key in self.reading.keys)
        chosen_ratio = chosen - batch["ref_chosen_logps"].values.to(chosen)
        rejected_ratio = rejected - batch["ref_rejected_logps"].values.to(rejected)
        if self.loss_type == "ipo":
            per_pair = self._ipo(chosen_ratio, rejected_ratio, batch)
        else:
            flipped = pair_numbers(batch, "flip_probability", self.label_smoothing, chosen)
            per_pair = self._sigmoid(chosen_ratio - rejected_ratio, flipped)
        total = (pair_numbers(batch, "pair_weight", 1.0, chosen) * per_pair).sum()
        sums = preference_sums(self.beta * chosen_ratio.detach(), self.beta * rejected_ratio.detach())
        sums |= {"chosen_logps": chosen.detach().sum(), "rejected_logps": rejected.detach().sum()}
        return LossSums(total=total, sums=sums)

    def _sigmoid(self, ahead: Tensor, flipped: Tensor) -> Tensor:
        margin = self.beta * ahead
        return -(1 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin)

    def _ipo(self, chosen_ratio: Tensor, rejected_ratio: Tensor, batch: Batch) -> Tensor:
        num_tokens = (num_completion_tokens(batch, side).clamp(min=1).to(chosen_ratio) for side in SIDES)
        per_token = [ratio / n for ratio, n in zip((chosen_ratio, rejected_ratio), num_tokens, strict=True)]
        return (per_token[0] - per_token[1] - 1 / (2 * self.beta)).square()

    def stop_reason(self, stats: Mapping[str, float]) -> str | None:
        """Never stopped."""
        del stats
        return None

    def summarise(self, updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """As a reward model's, of the implicit rewards; and log-probs, summed over each completion."""
        logps = {f"logps/{side}": mean_over_updates(updates, f"{side}_logps") for side in SIDES}
        return preference_metrics(updates) | logps


def share_won(margin: Tensor) -> Tensor:
    """1 where the chosen text is ahead, 0 where it is behind, a half for a tie: whoever cannot tell guesses."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def pair_numbers(batch: Batch, key: str, default: float, like: Tensor) -> Tensor:
    """One number per pair [n]: the batch's, or the default where it has none."""
    return batch[key].values.to(like) if key in batch else torch.full_like(like, default)


def has_pairs(batch: Batch) -> bool:
    """Whether any pair of a batch has a weight; without that key all have."""
    return bool(batch["pair_weight"].values.any()) if "pair_weight" in batch else len(batch) > 0


def preference_sums(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Of the rewards of both texts [n]: how often the chosen one is ahead, by how much, and each."""
    margin = chosen - rejected
    return {
        "accuracy": share_won(margin).sum(),
        "margin": margin.sum(),
        "chosen": chosen.sum(),
        "rejected": rejected.sum(),
    }


def preference_metrics(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The means of those, under the field's names, with loss and gradient norm."""
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
