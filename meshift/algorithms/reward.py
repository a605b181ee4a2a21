"""A reward model from preference pairs (Bradley-Terry): one train call.

Batch keys: `chosen` and `rejected`, the token ids of both texts, one row per pair. It knows nothing of data files.
"""

from __future__ import annotations

from meshift.algorithms.losses import PairwiseLoss
from meshift.graph.calls import Graph, ModelCall
from meshift.training.engine import TrainTask

PAIR_INPUTS = ("chosen", "rejected")


def reward_graph() -> Graph:
    """One update per step, on all of the step's pairs."""
    train = ModelCall(
        name="train_reward",
        role="reward",
        kind="train",
        task=TrainTask(loss=PairwiseLoss()),
        reads=PAIR_INPUTS,
    )
    return Graph((train,), frozenset(PAIR_INPUTS))
