"""Where the losses clip there is no gradient at all, where they do not there is; and what stops an update."""

import math

import pytest
import torch
from tiny_rl import random_rollout, tiny_model

from meshift.algorithms.losses import PairwiseLoss, PolicyLoss, ValueLoss
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.runtime.role import LocalRole
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

RATIOS = (0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5, 4.0)


def policy(**options):
    return PolicyLoss(reading=TokenLogprobs(), **options)


def surrogate(loss, advantage, ratios=RATIOS, entropy=None):
    """Loss and the gradient of each token's log-prob, for one advantage and these ratios."""
    lengths = torch.tensor([len(ratios)])
    new = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_(True)
    given = {
        "logprobs": Ragged(torch.zeros(len(ratios)), lengths),
        "advantages": Ragged(torch.full((len(ratios),), advantage), lengths),
    }
    outputs = {"new_logprobs": Ragged(new, lengths)}
    if entropy is not None:
        outputs["entropy"] = Ragged(entropy, lengths)
    result = loss(outputs, Batch(given))
    result.total.backward()
    return result, dict(zip(ratios, new.grad.tolist(), strict=True))


def test_the_clip_acts_beyond_it_the_gradient_is_exactly_zero():
    """Trap 10. Low and high differ: clipped above 1.4 for good tokens, below 0.8 for bad ones."""
    loss = policy(clip_ratio_low=0.2, clip_ratio_high=0.4)
    result, gradient = surrogate(loss, 2.0)
    assert gradient == pytest.approx({r: -2.0 * r if r < 1.4 else 0.0 for r in RATIOS})
    assert [gradient[r] for r in (1.5, 4.0)] == [0.0, 0.0]
    assert float(result.sums["pg_clipfrac"]) == 2
    result, gradient = surrogate(loss, -2.0)
    assert gradient == pytest.approx({r: 2.0 * r if r > 0.8 else 0.0 for r in RATIOS})
    assert float(result.sums["pg_clipfrac"]) == 2


def test_dual_clip_bounds_bad_tokens_whose_ratio_exploded():
    result, gradient = surrogate(policy(dual_clip=3.0), -2.0)
    assert gradient[4.0] == 0.0
    assert gradient[1.5] == pytest.approx(3.0)
    undamped, plain = surrogate(policy(), -2.0)
    assert plain[4.0] == pytest.approx(8.0)
    assert float(undamped.total.detach() - result.total.detach()) == pytest.approx(2.0 * (4.0 - 3.0))
    assert surrogate(policy(dual_clip=3.0), 2.0)[1] == surrogate(policy(), 2.0)[1], "good tokens are not touched"


def test_the_surrogate_is_the_minimum_of_equation_7():
    for advantage in (1.5, -1.5):
        result, _ = surrogate(policy(), advantage)
        expected = sum(-min(r * advantage, min(max(r, 0.8), 1.2) * advantage) for r in RATIOS)
        assert float(result.total.detach()) == pytest.approx(expected)
        assert float(result.sums["pg_loss"]) == pytest.approx(expected)


def test_the_entropy_bonus_raises_entropy():
    entropy = torch.full((len(RATIOS),), 0.5, dtype=torch.float64, requires_grad=True)
    result, _ = surrogate(policy(entropy_coef=0.25), 1.0, entropy=entropy)
    assert entropy.grad.tolist() == [-0.25] * len(RATIOS), "more entropy, less loss"
    plain, _ = surrogate(policy(), 1.0)
    assert float(result.total.detach()) == pytest.approx(float(plain.total.detach()) - 0.25 * 0.5 * len(RATIOS))


def test_the_value_clip_stops_the_gradient_where_it_decides_and_only_there():
    old, goal = torch.zeros(5), torch.tensor([1.0, 1.0, 1.0, -1.0, 0.1])
    new = torch.tensor([0.1, 0.5, -0.5, 0.5, 0.15], requires_grad=True)
    lengths = torch.tensor([5])
    given = Batch(
        {"values": Ragged(torch.cat([old, torch.ones(1)]), lengths + 1), "returns": Ragged(goal, lengths)}
    )
    outputs = {"new_values": Ragged(torch.cat([new, torch.full((1,), 99.0)]), lengths + 1)}
    result = ValueLoss(cliprange_value=0.2)(outputs, given)
    result.total.backward()
    # 0.5 runs ahead to its goal and is held at 0.2; the others err more than the clipped value would.
    assert new.grad.tolist() == pytest.approx([-0.9, 0.0, -1.5, 1.5, 0.05])
    worst = [0.9, 0.8, 1.5, 1.5, 0.05]
    assert float(result.total.detach()) == pytest.approx(0.5 * sum(w * w for w in worst))
    assert float(result.sums["vf_clipfrac"]) == 1
    unclipped = ValueLoss(cliprange_value=None)(outputs, given)
    assert float(unclipped.total.detach()) == pytest.approx(0.5 * float(((new - goal) ** 2).sum().detach()))


def test_the_pairwise_loss_is_bradley_terry():
    chosen, rejected = torch.tensor([2.0, -1.0, 0.0]), torch.tensor([0.5, 1.0, 0.0])
    scores = {"chosen_scores": Ragged.scalars(chosen), "rejected_scores": Ragged.scalars(rejected)}
    result = PairwiseLoss()(scores, Batch({}))
    expected = sum(-math.log(1 / (1 + math.exp(-m))) for m in (1.5, -2.0, 0.0))
    assert float(result.total) == pytest.approx(expected)
    assert {k: float(v) for k, v in result.sums.items()} == {
        "accuracy": 1.5,  # a tie is half
        "margin": -0.5,
        "chosen": 1.0,
        "rejected": 1.5,
    }


@pytest.mark.parametrize(
    ("limits", "shift", "stops"),
    [
        ({"max_importance_ratio": 5.0}, math.log(5.2), True),
        ({"max_importance_ratio": 5.0}, math.log(4.8), False),
        ({"max_update_kl": 0.1}, -0.11, True),
        ({"max_update_kl": 0.1}, -0.09, False),
        ({}, math.log(50.0), False),
    ],
)
def test_an_update_too_far_from_the_sampler_is_not_made(limits, shift, stops):
    """Behaviour log-probs are set `shift` nats below the model's: every ratio is exp(shift)."""
    role = LocalRole("actor", tiny_model(), TrainableConfig(), trainable=True)
    batch = random_rollout()
    new = role.infer(TokenLogprobs(), batch).batch["new_logprobs"]
    batch = batch.union(Batch({"logprobs": Ragged(new.values - shift, new.lengths)}))
    before = {name: p.detach().clone() for name, p in role.model.named_parameters()}
    metrics = role.train(TrainTask(loss=policy(**limits), num_mini_batches=3), batch, step=0).metrics
    changed = any(not torch.equal(p, before[name]) for name, p in role.model.named_parameters())
    assert changed is not stops
    assert metrics["actor/early_stop"] == float(stops)
    assert role.version == (0 if stops else 3)
    assert metrics["sync/logprob_diff_max"] == pytest.approx(abs(shift), abs=1e-4)


def test_sampler_and_trainer_are_compared_before_the_first_update_moves_the_policy():
    role = LocalRole("actor", tiny_model(), TrainableConfig(learning_rate=0.05), trainable=True)
    batch = random_rollout()
    new = role.infer(TokenLogprobs(), batch).batch["new_logprobs"]
    batch = batch.union(Batch({"logprobs": new}))
    metrics = role.train(TrainTask(loss=policy(), num_epochs=4), batch, step=0).metrics
    assert metrics["sync/logprob_diff_max"] < 1e-5
    assert abs(metrics["actor/ppo_kl"]) > 1e-4, "later updates did move it"
