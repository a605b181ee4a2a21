"""Margins, weights and centring of the reward model's loss, against `transformers` and the formula."""

import pytest
import torch
from tiny_rl import tiny_model
from tiny_texts import random_pairs
from twins import accumulated, hidden_rows, relative_difference, twin_of

from meshift.algorithms.losses import PairwiseLoss
from meshift.algorithms.reward import reward_graph
from meshift.batch import Batch, Ragged
from meshift.config.sections import RewardLossConfig, TrainableConfig
from meshift.runtime.role import LocalRole
from meshift.step import run_step

CENTRING = 0.3


def scores_of(twin, batch):
    for side in ("chosen", "rejected"):
        rows = batch[side].rows()
        last = torch.tensor([len(row) - 1 for row in rows])
        yield twin.score(hidden_rows(twin, rows))[torch.arange(len(rows)), last, 0]


@pytest.mark.parametrize("num_parts", [1, 3])
def test_loss_and_gradient_with_margin_weight_and_centring_are_those_of_transformers(tmp_path, num_parts):
    batch = random_pairs()
    ours, stats = accumulated("reward", PairwiseLoss(center_rewards_coefficient=CENTRING), batch, num_parts)
    twin, gradients = twin_of(tiny_model("reward"), tmp_path)
    chosen, rejected = scores_of(twin, batch)
    terms = -torch.log(torch.sigmoid(chosen - rejected - batch["required_margin"].values))
    terms = terms + CENTRING * (chosen + rejected) ** 2
    loss = (batch["pair_weight"].values * terms).mean()
    loss.backward()
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert relative_difference(ours, gradients()) < 1e-5
    assert stats["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)


def test_without_columns_and_coefficient_the_loss_is_plain_bradley_terry():
    scores = {
        "chosen_scores": Ragged.scalars([2.0, -1.0], torch.float64),
        "rejected_scores": Ragged.scalars([0.5, 1.0], torch.float64),
    }
    plain = PairwiseLoss()(scores, Batch({})).total
    neutral = {"required_margin": Ragged.scalars([0.0, 0.0]), "pair_weight": Ragged.scalars([1.0, 1.0])}
    assert PairwiseLoss()(scores, Batch(neutral)).total == plain
    assert float(plain) == pytest.approx(float(torch.log1p(torch.exp(torch.tensor([-1.5, 2.0]))).sum()))


def test_centring_draws_the_scores_of_both_texts_towards_zero():
    """The preference does not care where scores lie; the coefficient does."""
    batch = random_pairs()
    sums = {}
    for coefficient in (None, 1.0):
        model = tiny_model("reward")
        role = LocalRole("reward", model, TrainableConfig(learning_rate=0.01), trainable=True, max_steps=60)
        graph = reward_graph(RewardLossConfig(center_rewards_coefficient=coefficient))
        for step in range(60):
            metrics = run_step(graph, {"reward": role}, batch, step).metrics
        sums[coefficient] = abs(metrics["rewards/chosen"] + metrics["rewards/rejected"])
        assert metrics["accuracy"] > 0.8
    assert sums[1.0] < 0.3 * sums[None]
