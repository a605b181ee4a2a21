"""The same few prompts, completed again and again as the actor changes, for the report's side-by-side table.

A reward model may judge them, where nothing else does. Its draws are from streams of its own and it changes no
weight, so a run is the same with and without it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from meshift.batch import Batch, Outcome, Ragged
from meshift.config.sections import PPORewardConfig, RewardConfig
from meshift.generation.rollout import SamplingTask
from meshift.training.readings import SequenceScores, TokenScores

logger = logging.getLogger(__name__)

LONGEST_SHOWN = 60
NUM_TIMES = 5
"""Without a setting, the prompts are completed before the first step and about this many times after it."""
SEED_DISTANCE = 2**40
"""Added to the run's seed, which training's own streams start from."""


class Generates(Protocol):
    """Of a role: that it samples completions."""

    def generate(self, task: Any, batch: Batch) -> Outcome:
        """See `step.Role`."""


class Infers(Protocol):
    """Of a role: that it reads."""

    def infer(self, task: Any, batch: Batch) -> Outcome:
        """See `step.Role`."""


@dataclass(frozen=True, kw_only=True)
class FixedSamples:
    """Completes `prompts` (token ids) after the steps in `steps`, where 0 is before the first.

    `judge` gives each completion its reward from `tokens`; without it rows have none. One that is no number is
    none either, and a warning names its sample: the run goes on, since it learns nothing from these.
    """

    role: Generates
    task: SamplingTask
    prompts: Sequence[Sequence[int]]
    decode: Callable[[list[int]], str]
    steps: frozenset[int]
    judge: Callable[[Batch], list[float]] | None = None

    def rows(self, num_done: int) -> list[dict[str, Any]]:
        """Rows of samples.jsonl with `"fixed": true`; none after a step that is not among `steps`.

        Sequence i draws the same random numbers each time: what differs between two steps is the weights' doing.
        """
        if num_done not in self.steps or not self.prompts:
            return []
        count = len(self.prompts)
        given = Batch(
            {
                "prompts": Ragged.from_rows([list(prompt) for prompt in self.prompts], torch.int64),
                "index": Ragged.scalars(list(range(count)), torch.int64),
            }
        )
        task = replace(self.task, seed=self.task.seed + SEED_DISTANCE)
        drawn = self.role.generate(task, given).batch
        lengths = drawn["completion_lengths"].values.tolist()
        rewards = self._rewards(drawn, num_done) if self.judge is not None else None
        return [
            {
                "step": num_done,
                "index": i,
                "prompt": self.decode(tokens[: len(tokens) - length].tolist()),
                "completion": self.decode(tokens[len(tokens) - length :].tolist()),
                **({"reward": rewards[i]} if rewards is not None else {}),
                "truncated": bool(drawn["truncated"].values[i]),
                "fixed": True,
            }
            for i, (tokens, length) in enumerate(zip(drawn["tokens"].rows(), lengths, strict=True))
        ]

    def _rewards(self, drawn: Batch, num_done: int) -> list[float | None]:
        assert self.judge is not None
        found: list[float | None] = []
        for i, reward in enumerate(self.judge(drawn)):
            if not math.isfinite(reward):
                logger.warning(
                    f"the reward model gives {reward} to the report's sample {i} after {num_done} steps "
                    f"({self.decode(list(self.prompts[i]))[:LONGEST_SHOWN]!r}); samples.jsonl has no reward of it"
                )
            found.append(reward if math.isfinite(reward) else None)
        return found


def reward_judge(reward: RewardConfig, model: Infers | None) -> Callable[[Batch], list[float]] | None:
    """What a reward model says of completions, weighted as in training; None where functions have a say too.

    A function may keep a state or a count, and the run must be the same with and without the report's prompts.
    """
    if model is None or reward.functions:
        return None

    def judge(drawn: Batch) -> list[float]:
        if isinstance(reward, PPORewardConfig) and reward.per_token:
            read = model.infer(TokenScores(), drawn.select(("tokens", "completion_lengths"))).batch
            return [reward.weight * float(score) for score in read["process_scores"].sum_rows()]
        read = model.infer(SequenceScores(), drawn.select(("tokens",))).batch
        return [reward.weight * float(score) for score in read["scores"].values]

    return judge


def sampled_steps(max_steps: int, every: int | None) -> frozenset[int]:
    """Before the first step, after the last, and after every `every`-th (None: about `NUM_TIMES` in all)."""
    distance = every if every is not None else math.ceil(max_steps / NUM_TIMES)
    return frozenset((*range(0, max_steps, distance), max_steps))
