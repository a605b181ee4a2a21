"""RAFT: of several completions of each prompt the best are imitated; rejection sampling, best of n.

Source: Dong et al. 2023 (RAFT, arXiv 2304.06767), algorithm 1: the policy that was just trained draws the next
step's, and its reward is the score less kl_coef * KL of the completion. With `min_score` a prompt may keep none.
It knows nothing of where scores come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from meshift.algorithms.advantages import kl_estimate
from meshift.algorithms.policy_graph import Drawing, drawing_calls
from meshift.algorithms.policy_losses import LikelihoodLoss
from meshift.algorithms.rollouts import (
    infer_call,
    length_metrics,
    require_numbers,
    rollout_keys,
    score_metrics,
    shaped_scores,
    sync_calls,
    total_score,
)
from meshift.batch import Batch, Outcome, Ragged
from meshift.config.policy_runs import RAFTRunConfig
from meshift.generation.rollout import SamplingTask
from meshift.graph.calls import Call, Graph, LoopCall, ModelCall
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs


def raft_graph(config: RAFTRunConfig, drawing: Drawing) -> Graph:
    """Draw, score, keep the best, imitate them."""
    keys = config.raft
    loss = LikelihoodLoss(
        reading=_reading(config, drawing.sampling, "new_logprobs", entropy=True),
        aggregation=keys.loss_aggregation,
        max_completion_length=config.generation.max_completion_length,
    )
    calls: tuple[Call, ...] = (
        best_call(config, drawing),
        ModelCall(
            name="train_actor",
            role="actor",
            kind="train",
            task=TrainTask(
                loss=loss,
                num_epochs=keys.num_iterations,
                num_mini_batches=keys.num_mini_batches,
                max_staleness=config.max_staleness,
            ),
            reads=(*rollout_keys(drawing.sampling), "logprobs", "advantages", "trained", "versions"),
        ),
        *sync_calls(config.reference),
    )
    return Graph(calls, frozenset(drawing.inputs))


def best_call(config: RAFTRunConfig, drawing: Drawing) -> LoopCall:
    """Rollout and scoring, once, with the reference where KL counts; the step goes on with the best rows."""
    calls: tuple[Call, ...] = drawing_calls(config, drawing)
    if config.has_reference:
        reading = _reading(config, drawing.sampling, "ref_logprobs")
        read = rollout_keys(drawing.sampling)
        calls = (*calls, infer_call("reference", "reference", reading, read, "ref_logprobs"))
    written = tuple(key for call in calls for key in call.writes)
    return LoopCall(
        name="best_of_n",
        graph=Graph(calls, frozenset(drawing.inputs)),
        feed=lambda batch, outcomes: None if outcomes else batch,
        collect=partial(_kept, config=config),
        reads=drawing.inputs,
        writes=(*written, "scores", "advantages", "trained"),
        replaces_batch=True,
    )


def _reading(config: RAFTRunConfig, sampling: SamplingTask, key: str, *, entropy: bool = False) -> TokenLogprobs:
    """Of the distribution that is sampled from."""
    return TokenLogprobs(
        key=key,
        temperature=config.generation.temperature,
        with_entropy=entropy,
        stop_token_ids=sampling.params.stop_token_ids,
    )


def _kept(batch: Batch, outcomes: Sequence[Outcome], config: RAFTRunConfig) -> Outcome:
    del batch  # its rows are the outcome's
    drawn, keys = outcomes[0].batch, config.raft
    given, judged = total_score(drawn, config.reward.weight)
    truncated = drawn["truncated"].values.bool()
    scores = shaped_scores(given, truncated, missing_eos_penalty=keys.missing_eos_penalty)
    usable = judged if keys.min_score is None else judged & (scores >= keys.min_score)
    penalty, objective = _penalty(drawn, config)
    best = best_rows(scores - penalty, usable, config.generation.num_generations, keys.num_kept)
    rows = torch.tensor(best or [0])  # where none is good enough, one that is not trained on
    kept = drawn.index(rows)
    lengths = kept["completion_lengths"].values
    fields = {
        "scores": Ragged.scalars(given[rows]),
        "advantages": Ragged(torch.ones(int(lengths.sum())), lengths),
        "trained": Ragged.scalars(torch.full((len(rows),), bool(best))),
    }
    metrics = {
        **outcomes[0].metrics,
        **score_metrics(drawn, given[judged]),
        **length_metrics(drawn["completion_lengths"].values, truncated),
        **objective,
        "objective/no_score_fraction": float((~judged).float().mean()),
        "sampling/num_kept": float(len(best)),
    }
    if best:
        metrics["kept/reward/mean"] = float(given[rows].mean())
    return Outcome(batch=kept.union(Batch(fields)), metrics=metrics)


def _penalty(drawn: Batch, config: RAFTRunConfig) -> tuple[Tensor, dict[str, float]]:
    """What KL takes off each row's score [n], and KL to the reference per completion, by k1."""
    logprobs, coef = drawn["logprobs"], config.raft.kl_coef
    if not config.has_reference:
        return torch.zeros(len(drawn)), {}
    ref = drawn["ref_logprobs"].values
    cost = Ragged(kl_estimate(logprobs.values, ref, config.raft.kl_estimator), logprobs.lengths).sum_rows()
    kl = Ragged(logprobs.values - ref, logprobs.lengths).sum_rows().mean()
    require_numbers(cost, drawn, "KL to the reference")
    return coef * cost, {"objective/kl": float(kl), "objective/kl_coef": coef}


def best_rows(worth: Tensor, usable: Tensor, group: int, num_kept: int) -> list[int]:
    """Of every block of `group` rows the `num_kept` usable ones worth most [n], the first of those that tie."""
    best: list[int] = []
    for start in range(0, len(worth), group):
        rows = [i for i in range(start, start + group) if usable[i]]
        best += sorted(sorted(rows, key=lambda i: -float(worth[i]))[:num_kept])
    return best
