"""Drawing until enough prompts have completions that differ in score: which rows to draw next, and which to keep.

It knows nothing of how prompts are chosen, nor of how completions are drawn and scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from meshift.algorithms.advantages import has_signal
from meshift.algorithms.rollouts import score_metrics, total_score
from meshift.batch import Batch, Outcome, Ragged
from meshift.rewards.functions import STEP


def as_given(scores: Tensor, batch: Batch) -> Tensor:
    """Scores [n] that nothing is taken off."""
    del batch  # whatever was drawn
    return scores


@dataclass(frozen=True, kw_only=True)
class DynamicSampling:
    """Feeds and collects a `LoopCall`. `num_groups` groups with signal are wanted, in at most `max_rounds` rounds.

    Signal is a difference between a group's scores as `shape(scores, batch)` makes them, which are those that
    advantages are made of. Where the rounds end first, groups without it fill the step, the earliest first: their
    advantages are zero, but for KL where that is paid in the reward.
    """

    num_groups: int
    num_generations: int
    max_rounds: int
    weight: float
    more_prompts: Callable[[int, int, int], Batch] | None
    shape: Callable[[Tensor, Batch], Tensor] = as_given

    def feed(self, batch: Batch, outcomes: Sequence[Outcome]) -> Batch | None:
        """The step's own rows first; then as many prompts as the share with signal so far says are needed."""
        step = int(batch["index"].values.min()) // len(batch)
        if not outcomes:
            return _with_step(batch, step)
        kept = [self._signal(outcome.batch) for outcome in outcomes]
        missing = self.num_groups - sum(int(signal.sum()) for signal in kept)
        if missing <= 0 or len(outcomes) == self.max_rounds or self.more_prompts is None:
            return None
        share = float(torch.cat(kept).float().mean())
        count = self.num_groups if share == 0 else min(self.num_groups, math.ceil(missing / share))
        return _with_step(self.more_prompts(step, len(outcomes), count), step)

    def collect(self, batch: Batch, outcomes: Sequence[Outcome]) -> Outcome:
        """The first `num_groups` groups with signal, filled up if there are fewer. Metrics are of all drawn."""
        del batch  # its rows are the first outcome's
        drawn = Batch.concat([outcome.batch for outcome in outcomes])
        signal = self._signal(drawn)
        order = torch.argsort((~signal).int(), stable=True)[: self.num_groups].sort().values
        rows = (order[:, None] * self.num_generations + torch.arange(self.num_generations)).flatten()
        scores, judged = total_score(drawn, self.weight)
        metrics = {
            **merged_metrics(outcomes),
            **score_metrics(drawn, scores[judged]),
            "reward/frac_reward_zero_std": float((~signal).float().mean()),
            "sampling/num_rounds": float(len(outcomes)),
            "sampling/num_groups": float(len(signal)),
            "sampling/num_filled": float(max(0, self.num_groups - int(signal.sum()))),
        }
        return Outcome(batch=drawn.index(rows), metrics=metrics)

    def _signal(self, drawn: Batch) -> Tensor:
        """Whether the shaped scores of each group differ, bool [groups]."""
        scores, judged = total_score(drawn, self.weight)
        return has_signal(self.shape(scores, drawn), judged, self.num_generations)[:: self.num_generations]


def _with_step(batch: Batch, step: int) -> Batch:
    return batch.union(Batch({STEP: Ragged.scalars([step] * len(batch), torch.int64)}))


def merged_metrics(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """One value per metric of several rounds: seconds and counts are added, means weighted by their rows.

    Of peaks of memory the largest counts.
    """
    names = dict.fromkeys(key for outcome in outcomes for key in outcome.metrics)
    merged = {}
    for name in names:
        known = [(o.metrics[name], len(o.batch)) for o in outcomes if name in o.metrics]
        if name.startswith("perf/peak_memory_gb/"):
            merged[name] = max(value for value, _ in known)
        elif name.startswith(("timing_s/", "perf/")) or "/num_" in name:
            merged[name] = sum(value for value, _ in known)
        else:
            merged[name] = sum(value * size for value, size in known) / sum(size for _, size in known)
    return merged
