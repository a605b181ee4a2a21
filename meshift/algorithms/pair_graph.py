"""The step of the methods that learn from pairs without a reference: one train call.

It knows nothing of any one method's loss.
"""

from __future__ import annotations

from meshift.algorithms.preference_losses import ReferenceFreeLoss
from meshift.batch import WHERE
from meshift.graph.calls import Graph, ModelCall
from meshift.training.engine import TrainTask
from meshift.training.text_readings import PAIR_TEXTS


def pair_graph(loss: ReferenceFreeLoss) -> Graph:
    """Batch keys: both texts of every pair (`PAIR_TEXTS`), `pair_weight` and the place (`where`)."""
    reads = (*PAIR_TEXTS, "pair_weight", WHERE)
    train = ModelCall(name="train_actor", role="actor", kind="train", task=TrainTask(loss=loss), reads=reads)
    return Graph((train,), frozenset(reads))
