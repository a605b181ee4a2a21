"""PPO on rows that nothing has scored: they pay KL only, bootstrap, and are counted."""

import pytest
import torch
from tiny_rl import ppo_config

from meshift.algorithms.ppo import PPO
from meshift.batch import Batch, Ragged


def outcome(function_scores, **more):
    lengths = torch.tensor([2, 3])
    fields = {
        "function_scores": Ragged.scalars(torch.tensor(function_scores)),
        "values": Ragged(torch.arange(7.0), lengths + 1),
        "logprobs": Ragged(torch.zeros(5), lengths),
        "ref_logprobs": Ragged(torch.zeros(5), lengths),
        "truncated": Ragged.scalars(torch.zeros(2, dtype=torch.int64)),
    }
    ppo = {"value_norm": "none", "whiten_advantages": False}
    scalars = {key: Ragged.scalars(torch.tensor(value)) for key, value in more.items()}
    return PPO(ppo_config(ppo=ppo), None).advantages(Batch(fields | scalars))


def test_an_unscored_row_bootstraps_from_its_last_value_and_is_counted():
    done = outcome([4.0, float("nan")])
    assert done.batch["returns"].values.tolist() == [4.0, 4.0, 6.0, 6.0, 6.0], "score 4; the last value, 6"
    assert done.metrics["objective/no_score_fraction"] == 0.5
    assert done.metrics["reward/mean"] == 4.0, "of what was scored"


def test_a_row_that_the_reward_model_scores_is_scored():
    done = outcome([4.0, float("nan")], model_scores=[1.0, 2.0])
    assert done.batch["returns"].values.tolist() == pytest.approx([5.0, 5.0, 2.0, 2.0, 2.0])
    assert done.metrics["objective/no_score_fraction"] == 0.0
