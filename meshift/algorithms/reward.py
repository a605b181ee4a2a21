"""A reward model from preference pairs (Bradley-Terry): one train call.

Batch keys: `chosen` and `rejected`, the token ids of both texts, one row per pair; `required_margin` and
`pair_weight`, one number each; their places (`where`). It knows nothing of data files.
"""

from __future__ import annotations

from meshift.algorithms.losses import PairwiseLoss
from meshift.batch import WHERE
from meshift.config.sections import RewardLossConfig
from meshift.graph.calls import Graph, ModelCall
from meshift.training.engine import TrainTask

PAIR_INPUTS = ("chosen", "rejected", "required_margin", "pair_weight")


def reward_graph(config: RewardLossConfig) -> Graph:
    """One update per step, on all of the step's pairs."""
    train = ModelCall(
        name="train_reward",
        role="reward",
        kind="train",
        task=TrainTask(loss=PairwiseLoss(center_rewards_coefficient=config.center_rewards_coefficient or 0.0)),
        reads=(*PAIR_INPUTS, WHERE),
    )
    return Graph((train,), frozenset((*PAIR_INPUTS, WHERE)))
