"""What every method on sampled completions begins and ends with: its first calls, scores, and their metrics.

It knows nothing of how a method makes advantages of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meshift.batch import WHERE, Batch, Outcome
from meshift.config.sections import PPORewardConfig, ReferenceConfig, RewardConfig
from meshift.errors import NonFiniteError
from meshift.generation.rollout import SamplingTask
from meshift.graph.calls import Call, HostCall, ModelCall, SyncCall
from meshift.training.readings import SequenceScores, TokenScores

ROLLOUT_INPUTS = ("prompts", "index")
MOST_NAMED = 3
"""Samples that an error names."""
RewardCall = Callable[[Batch], Outcome]


def rollout_keys(sampling: SamplingTask) -> tuple[str, ...]:
    """The keys of a rollout that a `TokenLogprobs` reads."""
    return ("tokens", "completion_lengths", *sampling.support_keys)


def rollout_call(sampling: SamplingTask) -> ModelCall:
    """The actor completes the step's prompts."""
    return ModelCall(
        name="rollout",
        role="actor",
        kind="generate",
        task=sampling,
        reads=ROLLOUT_INPUTS,
        writes=(*rollout_keys(sampling), "logprobs", "truncated", "versions"),
    )


def scoring_calls(
    reward: RewardConfig, reward_functions: RewardCall | None, columns: tuple[str, ...]
) -> tuple[Call, ...]:
    """The reward model, where there is one, and reward functions, which read tokens and `columns`."""
    calls: list[Call] = []
    if isinstance(reward, PPORewardConfig) and reward.per_token:
        read = ("tokens", "completion_lengths")
        calls.append(infer_call("score", "reward", TokenScores(), read, "process_scores"))
    elif reward.model_name_or_path is not None:
        scoring = SequenceScores(key="model_scores")
        calls.append(infer_call("score", "reward", scoring, ("tokens",), "model_scores"))
    if reward_functions is not None:
        reads = ("tokens", "completion_lengths", *columns)
        written = ("function_scores",)
        calls.append(HostCall(name="reward_functions", function=reward_functions, reads=reads, writes=written))
    return tuple(calls)


def infer_call(name: str, role: str, reading: Any, reads: tuple[str, ...], key: str) -> ModelCall:
    """A role reads the completions and writes `key`."""
    return ModelCall(name=name, role=role, kind="infer", task=reading, reads=reads, writes=(key,))


def sync_calls(reference: ReferenceConfig) -> tuple[SyncCall, ...]:
    """The reference follows the actor, if it is to."""
    if not reference.sync_ref_model:
        return ()
    return (
        SyncCall(
            name="sync_reference",
            source="actor",
            target="reference",
            rate=reference.ref_model_mixup_alpha,
            every=reference.ref_model_sync_steps,
        ),
    )


def total_score(batch: Batch, weight: float, of: str = "") -> tuple[Tensor, Tensor]:
    """Each row's score [n], and whether anything scored it [n]: where no function did, `function_scores` is NaN.

    `weight` is the reward model's; the functions' scores come weighted. Of rewards per token it is the sum.
    With `of`, of scores whose names begin with that. Raises `NonFiniteError` for a score that is no number.
    """
    total, judged = torch.zeros(len(batch)), torch.zeros(len(batch), dtype=torch.bool)
    who = "cost" if of else "reward"
    if f"{of}model_scores" in batch:
        given = weight * batch[f"{of}model_scores"].values
        total = total + require_numbers(given, batch, f"the {who} model's score")
        judged = ~judged
    if f"{of}process_scores" in batch:
        given = weight * batch[f"{of}process_scores"].sum_rows()
        total = total + require_numbers(given, batch, f"the sum of the {who} model's scores per token")
        judged = ~judged
    if f"{of}function_scores" in batch:
        scored = ~batch[f"{of}function_scores"].values.isnan()
        given = torch.where(scored, batch[f"{of}function_scores"].values, 0.0)
        total = total + require_numbers(given, batch, f"the {who} functions' weighted score")
        judged = judged | scored
    return total, judged


def shaped_scores(
    scores: Tensor, truncated: Tensor, *, clip: float | None = None, missing_eos_penalty: float | None = None
) -> Tensor:
    """Scores [n] as they are compared: clipped to plus or minus `clip`, less the penalty where `truncated` [n]."""
    clipped = scores if clip is None else scores.clamp(-clip, clip)
    return torch.where(truncated.bool(), clipped - (missing_eos_penalty or 0.0), clipped)


def require_numbers(values: Tensor, batch: Batch, what: str) -> Tensor:
    """The `values` [n], one per row of the batch, all of them finite.

    Comparisons with NaN are false, so that a group with one would pass for a group of equal scores. Raises
    `NonFiniteError`: `what` is no number in which samples, with their places in the data where the batch has them.
    """
    wrong = (~torch.isfinite(values)).nonzero()[:, 0].tolist()
    if not wrong:
        return values
    places = batch.columns.get(WHERE)
    named = [f"sample {i}{f', {places[i]}' if places and places[i] else ''}" for i in wrong[:MOST_NAMED]]
    more = "; ..." if len(wrong) > MOST_NAMED else ""
    raise NonFiniteError(
        f"{what} is {float(values[wrong[0]])} in {len(wrong)} of {len(values)} completions "
        f"({'; '.join(named)}{more}); nothing was learned from them: look at these prompts and at the "
        "function or model behind it; where models compute in bfloat16, try dtype: float32"
    )


def score_metrics(batch: Batch, scores: Tensor) -> dict[str, float]:
    """Mean and spread of the rows that have a score, where there is one, and the reward model's mean."""
    metrics: dict[str, float] = {}
    if len(scores):
        metrics = {"reward/mean": float(scores.mean()), "reward/std": float(scores.std(unbiased=False))}
    if "model_scores" in batch:
        metrics["reward/reward_model"] = float(batch["model_scores"].values.mean())
    if "process_scores" in batch:
        metrics["reward/reward_model"] = float(batch["process_scores"].sum_rows().mean())
    return metrics


def length_metrics(lengths: Tensor, truncated: Tensor) -> dict[str, float]:
    """Completion tokens, and the share of completions that ran into the length limit."""
    return {
        "response_length/mean": float(lengths.double().mean()),
        "response_length/max": float(lengths.max()),
        "response_length/min": float(lengths.min()),
        "response_length/clip_ratio": float(truncated.float().mean()),
    }
