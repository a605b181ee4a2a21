"""DAPO: clip higher, draw until every group can teach something, a mean over tokens, a price for running long.

Source: Yu et al. 2025 (DAPO, arXiv 2503.14476), section 3: GRPO's advantages with clip_ratio_high above
clip_ratio_low, no KL, prompts whose completions all score the same replaced by others (3.2), and the soft overlong
punishment (equation 13) on top of the scores. Completions that differ by that punishment alone teach something, so
their prompt is not replaced (the paper's are those with right and with wrong answers).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from meshift.algorithms.dynamic_sampling import DynamicSampling
from meshift.algorithms.group_baseline import group_advantages
from meshift.algorithms.policy_graph import (
    Drawing,
    Method,
    Scored,
    clipped_loss,
    drawing_calls,
    policy_graph,
    scores_by,
)
from meshift.batch import Batch, Ragged
from meshift.config.policy_runs import DAPORunConfig
from meshift.graph.calls import Graph, LoopCall
from meshift.rewards.functions import STEP


def dapo_graph(config: DAPORunConfig, drawing: Drawing) -> Graph:
    """Completions of prompts that have signal, compared; token ratios."""
    method = Method(
        advantages=partial(dapo_advantages, config=config),
        loss=clipped_loss(config, drawing.sampling),
        draw=dynamic_sampling(config, drawing) if config.dapo.dynamic_sampling else None,
    )
    return policy_graph(config, drawing, method)


def dynamic_sampling(config: DAPORunConfig, drawing: Drawing) -> LoopCall:
    """Rollout and scoring, repeated on further prompts until a step's worth of groups has signal."""
    inner = replace(drawing, columns=(*drawing.columns, STEP) if drawing.columns else ())
    calls = drawing_calls(config, inner)
    sampling = DynamicSampling(
        num_groups=config.data.batch_size,
        num_generations=config.generation.num_generations,
        max_rounds=config.dapo.max_sampling_rounds,
        weight=config.reward.weight,
        more_prompts=drawing.more_prompts,
        shape=partial(_shape, config),
    )
    return LoopCall(
        name="sampling",
        graph=Graph(calls, frozenset((*drawing.inputs, STEP))),
        feed=sampling.feed,
        collect=sampling.collect,
        reads=drawing.inputs,
        writes=tuple(key for call in calls for key in call.writes),
        replaces_batch=True,
    )


def _shape(config: DAPORunConfig, scores: Tensor, batch: Batch) -> Tensor:
    """Scores as the advantages are made of them."""
    return scores_by(config, scores, batch) - _price(config, batch["completion_lengths"].values)


def _price(config: DAPORunConfig, lengths: Tensor) -> Tensor:
    limit, length = config.generation.max_completion_length, config.dapo.overlong_buffer_length
    return config.dapo.overlong_penalty * overlong_price(lengths, limit, limit // 5 if length is None else length)


def dapo_advantages(scored: Scored, config: DAPORunConfig) -> tuple[Ragged, dict[str, float]]:
    """GRPO's, of scores less what long completions pay."""
    price = _price(config, scored.lengths)
    priced = replace(scored, scores=scored.scores - price)
    advantages, metrics = group_advantages(priced, config.dapo.scale_rewards)
    return advantages, {**metrics, "reward/overlong_penalty": float(price.mean())}


def overlong_price(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """0 up to `limit - buffer` tokens, then linearly up to 1 at `limit` (equation 13, with the sign turned)."""
    if buffer == 0:
        return torch.zeros(len(lengths))
    return ((lengths - (limit - buffer)) / buffer).clamp(min=0.0, max=1.0)
