"""Direct preference optimisation: the reference reads both texts of every pair, then the actor is trained.

Source: Rafailov et al. 2023 ("Direct Preference Optimization"); the formulas are in `DPOLoss`. Batch keys are
those of `PairLogprobs`, `pair_weight`, and the place (`where`) of every pair. It knows nothing of data files.
"""

from __future__ import annotations

from meshift.algorithms.losses import DPOLoss
from meshift.batch import WHERE
from meshift.config.runs import DPORunConfig
from meshift.graph.calls import Call, Graph, ModelCall, SyncCall
from meshift.training.engine import TrainTask
from meshift.training.text_readings import PAIR_TEXTS, PairLogprobs

REFERENCE_READING = PairLogprobs(prefix="ref_")


def dpo_graph(config: DPORunConfig) -> Graph:
    """One update per step, on all of the step's pairs.

    With `precompute_ref_log_probs` the reference's log-probs come with the batch, and no reference is called.
    """
    known = config.dpo.precompute_ref_log_probs
    reference = ModelCall(
        name="reference",
        role="reference",
        kind="infer",
        task=REFERENCE_READING,
        reads=PAIR_TEXTS,
        writes=REFERENCE_READING.keys,
    )
    train = ModelCall(
        name="train_actor",
        role="actor",
        kind="train",
        task=TrainTask(loss=dpo_loss(config)),
        reads=(*PAIR_TEXTS, "pair_weight", *REFERENCE_READING.keys, WHERE),
    )
    calls: list[Call] = [train] if known else [reference, train]
    if config.reference.sync_ref_model:
        calls.append(
            SyncCall(
                name="sync_reference",
                source="actor",
                target="reference",
                rate=config.reference.ref_model_mixup_alpha,
                every=config.reference.ref_model_sync_steps,
            )
        )
    given = REFERENCE_READING.keys if known else ()
    return Graph(tuple(calls), frozenset((*PAIR_TEXTS, "pair_weight", *given, WHERE)))


def dpo_loss(config: DPORunConfig) -> DPOLoss:
    """The loss that a config asks for, of training and of held-out pairs."""
    dpo = config.dpo
    return DPOLoss(beta=dpo.beta, loss_type=dpo.loss_type, label_smoothing=dpo.label_smoothing)
