"""ReMax: REINFORCE with the score of the greedy completion as baseline.

Source: Li et al. 2024 (ReMax, arXiv 2310.10505), algorithm 1: A_t = sum over s >= t of reward_s - r(greedy), where
rewards are the score at the last token and -kl_coef * KL at each. The greedy completion is drawn once per prompt;
its score is clipped, and penalised where it was cut off, as those of the others are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from meshift.algorithms.advantages import returns_to_go, token_rewards
from meshift.algorithms.policy_graph import (
    Drawing,
    Method,
    Scored,
    clipped_loss,
    drawing_calls,
    policy_graph,
    scores_by,
)
from meshift.algorithms.rollouts import total_score
from meshift.batch import Batch, Outcome, Ragged
from meshift.config.policy_runs import ReMaxRunConfig
from meshift.graph.calls import Graph, LoopCall
from meshift.rewards.functions import STEP


def remax_graph(config: ReMaxRunConfig, drawing: Drawing) -> Graph:
    """Completions of each prompt, and one more that is greedy; token ratios."""
    method = Method(
        advantages=remax_advantages,
        loss=clipped_loss(config, drawing.sampling),
        compare=(greedy_call(config, drawing),),
        reads=("baseline", "baseline_judged"),
    )
    return policy_graph(config, drawing, method)


def greedy_call(config: ReMaxRunConfig, drawing: Drawing) -> LoopCall:
    """The most probable completion of each prompt, and its score at each of the prompt's rows."""
    greedy = replace(drawing.sampling, params=replace(drawing.sampling.params, temperature=0.0))
    inner = replace(drawing, columns=(*drawing.columns, STEP) if drawing.columns else ())
    group = config.generation.num_generations
    return LoopCall(
        name="greedy_baseline",
        graph=Graph(drawing_calls(config, inner, greedy), frozenset((*drawing.inputs, STEP))),
        feed=partial(_one_row_per_prompt, group=group),
        collect=partial(_baseline, config=config),
        reads=drawing.inputs,
        writes=("baseline", "baseline_judged"),
    )


def _one_row_per_prompt(batch: Batch, outcomes: Sequence[Outcome], group: int) -> Batch | None:
    if outcomes:
        return None
    step = int(batch["index"].values.min()) // len(batch)
    first = batch.index(range(0, len(batch), group))
    return first.union(Batch({STEP: Ragged.scalars([step] * len(first), torch.int64)}))


def _baseline(batch: Batch, outcomes: Sequence[Outcome], config: ReMaxRunConfig) -> Outcome:
    del batch  # its rows are the greedy completions' prompts, `group` times each
    greedy, group = outcomes[0], config.generation.num_generations
    scores, judged = total_score(greedy.batch, config.reward.weight)
    written = {
        "baseline": Ragged.scalars(scores_by(config, scores, greedy.batch).repeat_interleave(group)),
        "baseline_judged": Ragged.scalars(judged.repeat_interleave(group)),
    }
    metrics = {f"greedy/{key}": value for key, value in greedy.metrics.items() if key.startswith("reward/")}
    lengths = greedy.batch["completion_lengths"].values
    metrics["greedy/reward/mean"] = float(scores[judged].mean())
    metrics["greedy/response_length/mean"] = float(lengths.double().mean())
    return Outcome(batch=Batch(written), metrics=metrics)


def remax_advantages(scored: Scored) -> tuple[Ragged, dict[str, float]]:
    """Returns less the greedy score, at every token; zero where the greedy completion has no score."""
    penalty = Ragged(scored.penalty.values.double(), scored.lengths)
    returns = returns_to_go(token_rewards(penalty, 1.0, scored.scores.double(), scored.judged), 1.0)
    baseline = scored.batch["baseline"].values.double()
    usable = scored.judged & scored.batch["baseline_judged"].values
    values = returns.values - baseline.repeat_interleave(scored.lengths)
    kept = torch.where(usable.repeat_interleave(scored.lengths), values, 0.0)
    return Ragged(kept, scored.lengths), {"reward/over_greedy": float((scored.scores - baseline)[usable].mean())}
