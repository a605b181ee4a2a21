"""Online and iterative DPO: the policy's own completions, labelled by their scores, become pairs for DPO.

Sources: Guo et al. 2024 (OAIF, arXiv 2402.04792); rounds as in DPO-Iter of Xu et al. 2024 (arXiv 2404.10719):
after `steps_per_round` steps the reference becomes the actor. With one step per round all of a round's completions
are drawn by the policy that began it. The loss is `DPOLoss`. It knows nothing of where scores come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from meshift.algorithms.advantages import group_std, has_signal
from meshift.algorithms.losses import DPOLoss
from meshift.algorithms.policy_graph import Drawing, drawing_calls
from meshift.algorithms.rollouts import length_metrics, score_metrics, shaped_scores, sync_calls, total_score
from meshift.batch import Batch, Outcome, Ragged
from meshift.config.policy_runs import OnlineDPORunConfig
from meshift.graph.calls import Call, Graph, LoopCall, ModelCall, SyncCall
from meshift.training.engine import TrainTask
from meshift.training.text_readings import PAIR_TEXTS, SIDES, PairLogprobs

LABELS = ("pair_weight", "flip_probability")
OF_SIDES = tuple(f"{side}_{what}" for side in SIDES for what in ("scores", "truncated", "index"))


def online_dpo_graph(config: OnlineDPORunConfig, drawing: Drawing) -> Graph:
    """Draw, score, pair, read the reference, train."""
    keys, temperature = config.online_dpo, config.generation.temperature
    reference = PairLogprobs(prefix="ref_", temperature=temperature)
    loss = DPOLoss(beta=keys.beta, loss_type=keys.loss_type, reading=PairLogprobs(temperature=temperature))
    calls: tuple[Call, ...] = (
        pair_call(config, drawing),
        ModelCall(
            name="reference",
            role="reference",
            kind="infer",
            task=reference,
            reads=PAIR_TEXTS,
            writes=reference.keys,
        ),
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
            reads=(*PAIR_TEXTS, *LABELS, *reference.keys, "versions"),
        ),
        *_rounds(config),
    )
    return Graph(calls, frozenset(drawing.inputs))


def _rounds(config: OnlineDPORunConfig) -> tuple[SyncCall, ...]:
    every = config.online_dpo.steps_per_round
    if every is None:
        return sync_calls(config.reference)
    return (SyncCall(name="sync_reference", source="actor", target="reference", rate=1.0, every=every),)


def pair_call(config: OnlineDPORunConfig, drawing: Drawing) -> LoopCall:
    """Rollout and scoring, once; then the step goes on with a row per pair."""
    calls = drawing_calls(config, drawing)
    return LoopCall(
        name="pairs",
        graph=Graph(calls, frozenset(drawing.inputs)),
        feed=lambda batch, outcomes: None if outcomes else batch,
        collect=partial(_paired, config=config, inputs=drawing.inputs),
        reads=drawing.inputs,
        writes=(*PAIR_TEXTS, *LABELS, *OF_SIDES, "versions"),
        replaces_batch=True,
    )


def _paired(
    batch: Batch, outcomes: Sequence[Outcome], config: OnlineDPORunConfig, inputs: tuple[str, ...]
) -> Outcome:
    del batch  # its rows are the outcome's
    drawn, keys, group = outcomes[0].batch, config.online_dpo, config.generation.num_generations
    given, judged = total_score(drawn, config.reward.weight)
    truncated = drawn["truncated"].values.bool()
    scores = shaped_scores(given, truncated, missing_eos_penalty=keys.missing_eos_penalty)
    found = pairs_of(scores, judged, group, best_worst=keys.pairs == "best_worst")
    rows = torch.tensor(found or [(0, 1)])  # without any pair, one that counts for nothing
    chosen, rejected = rows[:, 0], rows[:, 1]
    flipped = torch.sigmoid(scores[rejected] - scores[chosen]) if keys.labels == "soft" else torch.zeros(len(rows))
    tokens, versions = drawn["tokens"], drawn["versions"].rows()
    fields = {
        "chosen": tokens.index(chosen),
        "rejected": tokens.index(rejected),
        "num_prompt_tokens": Ragged.scalars((tokens.lengths - drawn["completion_lengths"].values)[chosen]),
        "pair_weight": Ragged.scalars(torch.full((len(rows),), float(bool(found)))),
        "flip_probability": Ragged.scalars(flipped),
        "versions": Ragged.from_rows(
            [torch.cat([versions[i], versions[j]]) for i, j in rows.tolist()], torch.int64
        ),
    }
    for side, picked in zip(SIDES, (chosen, rejected), strict=True):
        fields[f"{side}_scores"] = Ragged.scalars(scores[picked])
        fields[f"{side}_truncated"] = Ragged.scalars(truncated[picked])
        fields[f"{side}_index"] = drawn["index"].index(picked)
    metrics = {
        **outcomes[0].metrics,
        **score_metrics(drawn, given[judged]),
        **length_metrics(drawn["completion_lengths"].values, truncated),
        "reward/group_std": float(group_std(scores, judged, group).mean()),
        "reward/frac_reward_zero_std": float((~has_signal(scores, judged, group)).float().mean()),
        "objective/no_score_fraction": float((~judged).float().mean()),
        "sampling/num_pairs": float(len(found)),
        "sampling/round": float(_round_of(drawn, keys.steps_per_round)),
    }
    return Outcome(batch=drawn.select(inputs).index(chosen).union(Batch(fields)), metrics=metrics)


def pairs_of(scores: Tensor, judged: Tensor, group: int, *, best_worst: bool) -> list[tuple[int, int]]:
    """(chosen, rejected) rows of every block of `group` rows, by score [n], among the judged [n].

    Best and worst of a block, the first of those that tie; or every two. Equal scores make no pair.
    """
    found: list[tuple[int, int]] = []
    for start in range(0, len(scores), group):
        rows = [i for i in range(start, start + group) if judged[i]]
        worth = {i: float(scores[i]) for i in rows}
        if best_worst and rows:
            two = [(max(rows, key=worth.__getitem__), min(rows, key=worth.__getitem__))]
        else:
            two = list(combinations(rows, 2))
        found += [(i, j) if worth[i] > worth[j] else (j, i) for i, j in two if worth[i] != worth[j]]
    return found


def _round_of(drawn: Batch, steps_per_round: int | None) -> int:
    """Counting from 1; without rounds all is one."""
    step = int(drawn["index"].values.min()) // len(drawn)
    return 1 if steps_per_round is None else step // steps_per_round + 1
