"""Supervised fine-tuning: one train call on demonstrations.

Batch keys: `tokens`, `loss_mask` and place (`where`) of every text. It knows nothing of chat templates, nor which
tokens are trained on and why.
"""

from __future__ import annotations

from meshift.algorithms.losses import TokenCrossEntropy
from meshift.batch import WHERE
from meshift.graph.calls import Graph, ModelCall
from meshift.training.engine import TrainTask

DEMONSTRATION_INPUTS = ("tokens", "loss_mask")


def sft_graph() -> Graph:
    """One update per step, on all of the step's texts."""
    train = ModelCall(
        name="train_actor",
        role="actor",
        kind="train",
        task=TrainTask(loss=TokenCrossEntropy()),
        reads=(*DEMONSTRATION_INPUTS, WHERE),
    )
    return Graph((train,), frozenset((*DEMONSTRATION_INPUTS, WHERE)))
