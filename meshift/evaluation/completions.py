"""A policy's completions of held-out prompts, and what they are worth: reward, KL to the reference, diversity.

It knows nothing of training. Every number is a mean over the prompts given, with completions drawn from seeds of
their own, so two policies are compared on the same prompts and the same random streams.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from meshift.batch import Batch, Ragged
from meshift.data.prompts import Prompt
from meshift.generation.rollout import SamplingTask
from meshift.runtime.role import LocalRole
from meshift.training.readings import SequenceScores, TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Completions:
    """One completion per prompt, as texts and as the batch the models read."""

    prompts: list[str]
    texts: list[str]
    batch: Batch

    @property
    def mean_length(self) -> float:
        """Tokens per completion."""
        return float(self.batch["completion_lengths"].values.double().mean())


def complete(
    actor: LocalRole, prompts: Sequence[Prompt], task: SamplingTask, tokenizer: PreTrainedTokenizerBase
) -> Completions:
    """Draw one completion per prompt; prompt i from the stream (task.seed, i)."""
    asked = Batch(
        {
            "prompts": Ragged.from_rows([p.tokens for p in prompts], torch.int64),
            "index": Ragged.scalars(list(range(len(prompts))), torch.int64),
        }
    )
    batch = actor.generate(task, asked).batch
    lengths = batch["completion_lengths"].values.tolist()
    rows = [row.tolist() for row in batch["tokens"].rows()]
    texts = [
        tokenizer.decode(row[len(row) - length :], skip_special_tokens=True)
        for row, length in zip(rows, lengths, strict=True)
    ]
    return Completions(prompts=[p.text for p in prompts], texts=texts, batch=batch)


def completion_rewards(reward: LocalRole, completions: Completions) -> list[float]:
    """The reward model's score of each completion."""
    scores = reward.infer(SequenceScores(), completions.batch.select(("tokens",))).batch["scores"]
    return [float(score) for score in scores.values]


def mean_reward(reward: LocalRole, completions: Completions) -> float:
    """The reward model's mean score."""
    return fmean(completion_rewards(reward, completions))


def completion_kls(
    actor: LocalRole, reference: LocalRole, completions: Completions, task: SamplingTask
) -> list[float]:
    """log p(completion) - log p_ref(completion) of each, in nats; their mean estimates KL(actor || reference).

    Both models' log-probs are read by the same engine, so the estimate holds none of the sampler's rounding.
    """
    reading = TokenLogprobs(temperature=task.params.temperature, stop_token_ids=task.params.stop_token_ids)
    keys = ("tokens", "completion_lengths", *task.support_keys)
    ours = actor.infer(reading, completions.batch.select(keys)).batch[reading.key]
    theirs = reference.infer(reading, completions.batch.select(keys)).batch[reading.key]
    return [float(kl) for kl in Ragged(ours.values - theirs.values, ours.lengths).sum_rows()]


def mean_kl(actor: LocalRole, reference: LocalRole, completions: Completions, task: SamplingTask) -> float:
    """KL(actor || reference) in nats per completion, from the actor's own completions."""
    return fmean(completion_kls(actor, reference, completions, task))


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words as a part of all n-grams, over all texts together (Li et al. 2016)."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = re.findall(r"[\w']+", text.lower())
        grams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(grams)) / len(grams) if grams else 0.0
