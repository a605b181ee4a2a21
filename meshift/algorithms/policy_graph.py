"""The step of every critic-free method: draw, score, compare, train. A method adds advantages and a loss.

It knows nothing of any one method, of devices, of how texts are sampled, or of where rewards come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from meshift.algorithms.advantages import group_std, has_signal, kl_estimate
from meshift.algorithms.off_policy import correction_of, paid_logprobs
from meshift.algorithms.policy_losses import ClippedLoss, PolicyGradientLoss
from meshift.algorithms.rollouts import (
    ROLLOUT_INPUTS,
    RewardCall,
    infer_call,
    length_metrics,
    require_numbers,
    rollout_call,
    rollout_keys,
    score_metrics,
    scoring_calls,
    shaped_scores,
    sync_calls,
    total_score,
)
from meshift.batch import WHERE, Batch, Outcome, Ragged
from meshift.config.policy_runs import PolicyRunConfig
from meshift.config.runs import RolloutRunConfig
from meshift.generation.rollout import SamplingTask
from meshift.graph.calls import Call, Graph, HostCall, LoopCall, ModelCall
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

SCORES = ("model_scores", "function_scores")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How completions are drawn, and what scores them. `columns` are what reward functions read of the batch.

    `more_prompts(step, round, count)` gives the rows of `count` prompts beyond the step's own.
    """

    sampling: SamplingTask
    reward_functions: RewardCall | None = None
    columns: tuple[str, ...] = ()
    more_prompts: Callable[[int, int, int], Batch] | None = None

    @property
    def place(self) -> tuple[str, ...]:
        """The key of where a row is in the data, if the batch has it: what errors name."""
        return tuple(key for key in self.columns if key == WHERE)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a step's batch holds before its first call."""
        return tuple(dict.fromkeys((*ROLLOUT_INPUTS, *self.columns)))


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A step's completions and what they are worth, n rows in blocks of `num_generations`, one block per prompt.

    `scores` [n] are clipped, with the penalty for a missing end; `judged` [n] says which rows have one. `penalty`
    [completion] is kl_coef * KL where that is paid in the reward, else zero. `batch` has what the call reads.
    """

    scores: Tensor
    judged: Tensor
    penalty: Ragged
    num_generations: int
    batch: Batch

    @property
    def lengths(self) -> Tensor:
        """Tokens of each completion [n]."""
        return self.penalty.lengths

    @property
    def rewards(self) -> Tensor:
        """What a whole completion earns [n]: its score less the penalties of its tokens, in fp64."""
        return self.scores.double() - self.penalty.sum_rows().double()

    def at_every_token(self, values: Tensor) -> Ragged:
        """One value per completion [n] at each of its tokens."""
        return Ragged(values.repeat_interleave(self.lengths), self.lengths)


Advantages = Callable[[Scored], tuple[Ragged, dict[str, float]]]
"""Scored completions to an advantage per token, and metrics of the method's own."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What makes a method: advantages and a loss. `draw` stands for the rollout and its scoring, if given.

    Advantages may read `reads` too, which `draw` or `compare` write.
    """

    advantages: Advantages
    loss: PolicyGradientLoss
    draw: LoopCall | None = None
    compare: tuple[Call, ...] = ()
    reads: tuple[str, ...] = ()


def policy_graph(config: PolicyRunConfig, drawing: Drawing, method: Method) -> Graph:
    """The calls of a step."""
    policy, rollout = config.policy, rollout_keys(drawing.sampling)
    draw = (method.draw,) if method.draw is not None else drawing_calls(config, drawing)
    scores = tuple(key for call in draw for key in call.writes if key in SCORES)
    known: list[Call] = []
    if config.has_reference:
        reading = token_logprobs(config, drawing.sampling, "ref_logprobs")
        known.append(infer_call("reference", "reference", reading, rollout, "ref_logprobs"))
    if method.loss.old == "recomputed":
        reading = token_logprobs(config, drawing.sampling, "old_logprobs")
        known.append(infer_call("old_logprobs", "actor", reading, rollout, "old_logprobs"))
    references = tuple(key for call in known for key in call.writes)
    advantages = AdvantageCall(config=config, method=method)
    compared = (*scores, *method.reads, "completion_lengths", "truncated", "logprobs")
    paid = [key for key in references if key == "ref_logprobs" or method.loss.correction is not None]
    calls: tuple[Call, ...] = (
        *draw,
        *method.compare,
        *known,
        HostCall(
            name="advantages",
            function=advantages,
            reads=(*compared, *paid, *drawing.place),
            writes=("scores", "advantages", "trained"),
        ),
        ModelCall(
            name="train_actor",
            role="actor",
            kind="train",
            task=TrainTask(
                loss=method.loss,
                num_epochs=policy.num_iterations,
                num_mini_batches=policy.num_mini_batches,
                max_staleness=config.max_staleness,
            ),
            reads=(*rollout, "logprobs", *references, "advantages", "trained", "versions"),
        ),
        *sync_calls(config.reference),
    )
    return Graph(calls, frozenset(drawing.inputs))


def drawing_calls(
    config: RolloutRunConfig, drawing: Drawing, sampling: SamplingTask | None = None
) -> tuple[Call, ...]:
    """The rollout, by `sampling` if that is another than training's, and what scores it."""
    scoring = scoring_calls(config.reward, drawing.reward_functions, drawing.columns)
    return (rollout_call(sampling or drawing.sampling), *scoring)


def token_logprobs(
    config: PolicyRunConfig, sampling: SamplingTask, key: str, *, entropy: bool = False
) -> TokenLogprobs:
    """The reading of reference and training alike: the distribution that is sampled from."""
    return TokenLogprobs(
        key=key,
        temperature=config.generation.temperature,
        with_entropy=entropy,
        entropy_gradient=config.policy.entropy_coef > 0,
        stop_token_ids=sampling.params.stop_token_ids,
    )


def loss_keys(config: PolicyRunConfig, sampling: SamplingTask) -> dict[str, Any]:
    """What every loss takes from the config."""
    policy = config.policy
    return {
        "reading": token_logprobs(config, sampling, "new_logprobs", entropy=True),
        "aggregation": policy.loss_aggregation,
        "max_completion_length": config.generation.max_completion_length,
        "old": config.old_logprobs,
        "kl_coef": policy.kl_coef if policy.kl_in == "loss" else 0.0,
        "kl_estimator": policy.kl_estimator,
        "entropy_coef": policy.entropy_coef,
        "clip_ratio_low": policy.clip_ratio_low,
        "clip_ratio_high": policy.clip_ratio_high,
        "max_importance_ratio": policy.max_importance_ratio,
        "max_update_kl": policy.max_update_kl,
        "correction": correction_of(policy),
    }


def clipped_loss(
    config: PolicyRunConfig, sampling: SamplingTask, importance: Literal["token", "mean", "sequence"] = "token"
) -> ClippedLoss:
    """PPO's clipped objective, with the config's keys."""
    return ClippedLoss(**loss_keys(config, sampling), importance=importance, dual_clip=config.policy.dual_clip)


@dataclass(frozen=True, kw_only=True)
class AdvantageCall:
    """The host call `advantages`: scores by the rules all methods share, then the method's own comparison."""

    config: PolicyRunConfig
    method: Method

    def __call__(self, batch: Batch) -> Outcome:
        """Write `scores` [1], `advantages` [completion] and `trained` [1]."""
        scores, judged = total_score(batch, self.config.reward.weight)
        truncated = batch["truncated"].values.bool()
        scored = Scored(
            scores=scores_by(self.config, scores, batch),
            judged=judged,
            penalty=self._penalty(batch),
            num_generations=self.config.generation.num_generations,
            batch=batch,
        )
        advantages, metrics = self.method.advantages(scored)
        trained = judged & ~truncated if self.config.policy.mask_truncated_completions else judged
        values = torch.where(trained.repeat_interleave(scored.lengths), advantages.values, 0.0).float()
        written = {
            "scores": Ragged.scalars(scores),
            "advantages": Ragged(values, advantages.lengths),
            "trained": Ragged.scalars(trained),
        }
        kept = {**score_metrics(batch, scores[judged]), **group_metrics(scored)}
        # Where completions were chosen by their scores, `reward/*` is of all that were drawn, and these are apart.
        prefix = "kept/" if self.method.draw is not None else ""
        shared = {
            **{f"{prefix}{key}": value for key, value in kept.items()},
            **self._objective(scored),
            "objective/trained_fraction": float(trained.float().mean()),
            **length_metrics(scored.lengths, batch["truncated"].values),
            "actor/advantages/mean": float(values.mean()),
            "actor/advantages/std": float(values.std(unbiased=False)),
        }
        return Outcome(batch=Batch(written), metrics={**shared, **metrics})

    def _penalty(self, batch: Batch) -> Ragged:
        policy, logprobs = self.config.policy, batch["logprobs"]
        if "ref_logprobs" not in batch or policy.kl_in == "loss":
            return Ragged(torch.zeros_like(logprobs.values), logprobs.lengths)
        kl = kl_estimate(paid_logprobs(batch).values, batch["ref_logprobs"].values, policy.kl_estimator)
        penalty = Ragged(policy.kl_coef * kl, logprobs.lengths)
        require_numbers(penalty.sum_rows(), batch, "KL to the reference")
        return penalty

    def _objective(self, scored: Scored) -> Mapping[str, float]:
        """KL to the reference per completion, by k1, and scores less what it costs."""
        metrics = {"objective/no_score_fraction": float((~scored.judged).float().mean())}
        if "ref_logprobs" not in scored.batch:
            return metrics
        logprobs, ref_logprobs = scored.batch["logprobs"], scored.batch["ref_logprobs"]
        kl = Ragged(logprobs.values - ref_logprobs.values, logprobs.lengths).sum_rows().mean()
        coef = self.config.policy.kl_coef
        earned = float((scored.scores * scored.judged).mean() - coef * kl)
        return {**metrics, "objective/kl": float(kl), "objective/kl_coef": coef, "objective/rlhf_reward": earned}


def scores_by(config: PolicyRunConfig, scores: Tensor, batch: Batch) -> Tensor:
    """The scores [n] of a batch's completions by the config's clip and penalty, wherever they are compared."""
    policy = config.policy
    keys = {"clip": policy.reward_clip, "missing_eos_penalty": policy.missing_eos_penalty}
    return shaped_scores(scores, batch["truncated"].values, **keys)


def group_metrics(scored: Scored) -> dict[str, float]:
    """How much the completions of a prompt differ in score; nothing where each prompt has one."""
    if scored.num_generations < 2:
        return {}
    given = (scored.scores, scored.judged, scored.num_generations)
    return {
        "reward/group_std": float(group_std(*given).mean()),
        "reward/frac_reward_zero_std": float((~has_signal(*given)).float().mean()),
    }
