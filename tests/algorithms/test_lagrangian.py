"""PPO with a cost: the multiplier and advantages in closed form, and optima that are known in advance."""

import math

import pytest
import torch
from tiny_choice import VOCAB, next_probabilities, total_variation
from tiny_rl import make_world, ppo_config, tiny_model

from meshift.algorithms.lagrangian import Lagrangian, _OfCosts
from meshift.batch import Batch, Outcome, Ragged
from meshift.errors import ConfigError

PRICES = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.8, 0.2, -1.0, 0.4])
COSTS = torch.tensor([0.0, 2.0, 0.3, -1.0, 1.5, 0.0, 0.5, -0.5])
KL_COEF = 0.5
LENGTHS = torch.tensor([3, 2, 4])


def config_for(cost=None, **sections):
    functions = [{"function": "unused:unused"}]
    return ppo_config(cost={"functions": functions, **(cost or {})}, **sections)


def priced(completion_ids):
    return [float(PRICES[ids[0]]) for ids in completion_ids]


def costly(completion_ids):
    return [float(COSTS[ids[0]]) for ids in completion_ids]


def test_the_multiplier_grows_with_what_is_over_the_limit_and_has_a_bound():
    lagrangian = Lagrangian(config_for({"limit": 0.5, "multiplier_learning_rate": 0.3, "multiplier_max": 3.0}))
    expected = 1.0
    for costs in ((1.0, 2.0, math.nan), (0.0, 0.0, 0.0), (9.0, 9.0, 9.0)):
        lagrangian.weigh(batch_of(costs), zeros(), zeros(), 0.0)
        given = [c for c in costs if not math.isnan(c)]
        expected = min(3.0, expected * math.exp(0.3 * expected * (sum(given) / len(given) - 0.5)))
        assert lagrangian.multiplier == pytest.approx(expected)
    assert expected == 3.0, "the bound must have been reached"
    again = Lagrangian(config_for({"limit": 0.5}))
    again.load_state_dict(lagrangian.state_dict())
    assert again.multiplier == lagrangian.multiplier
    assert again.value_norm == lagrangian.value_norm


def zeros():
    return Ragged(torch.zeros(int(LENGTHS.sum())), LENGTHS)


def batch_of(costs):
    """Of three completions, each expected to cost 7 after its end."""
    values = torch.cat([torch.tensor([0.0] * n + [7.0]) for n in LENGTHS.tolist()])
    return Batch(
        {
            "cost_function_scores": Ragged.scalars(torch.tensor(costs)),
            "cost_values": Ragged(values, LENGTHS + 1),
        }
    )


def test_advantages_of_costs_are_taken_off_and_both_sides_pay_kl():
    """gamma = lambda = 1 and a critic that knows nothing: advantages are returns. KL stays as strong as it was."""
    plain = {"value_norm": "none", "whiten_advantages": False}
    lagrangian = Lagrangian(config_for({"multiplier_init": 2.0, "multiplier_learning_rate": 0.0}, ppo=plain))
    kl = Ragged(torch.full((9,), 0.25), LENGTHS)
    reward_returns, costs = [4.0, 5.0, 6.0], (1.0, 2.0, 3.0)
    to_go = [[n - t for t in range(n)] for n in LENGTHS.tolist()]  # tokens from t on
    rewards = [[r - 0.4 * 0.25 * k for k in row] for r, row in zip(reward_returns, to_go, strict=True)]
    given = Ragged(torch.tensor([value for row in rewards for value in row]), LENGTHS)
    combined, outcome = lagrangian.weigh(batch_of(costs), given, kl, 0.4)
    expected = [
        (r - 2.0 * c) / 3.0 - 0.4 * 0.25 * k
        for r, c, row in zip(reward_returns, costs, to_go, strict=True)
        for k in row
    ]
    assert combined.values.tolist() == pytest.approx(expected, rel=1e-5)
    last = outcome.batch["cost_returns"].rows()[2][-1].item()
    assert last == pytest.approx(3.0 + 0.4 * 0.25), "nothing comes after the end, cut off or not"
    assert outcome.metrics["cost/mean"] == 2.0


def optimum(reference, weight):
    """Of E[(r - w c) / (1 + w)] - KL_COEF * KL(pi || reference)."""
    return torch.softmax(reference.log() + (PRICES - weight * COSTS) / (1 + weight) / KL_COEF, -1)


def world_for(num_steps, **cost):
    how = {"lr_scheduler_type": "linear"}
    config = config_for(
        cost,
        actor={"model_name_or_path": "unused", "learning_rate": 2e-3, "logits_chunk": 64, **how},
        critic={"learning_rate": 5e-3, **how},
        cost_critic={"learning_rate": 5e-3, **how},
        generation={"max_completion_length": 1},
        ppo={"length_limit_is_end": True, "num_mini_batches": 2, "cliprange_value": None, "kl_coef": KL_COEF},
    )
    return make_world(priced, config, cost=costly, vocab_size=VOCAB, max_steps=num_steps, scale=0.2)


def test_with_a_fixed_multiplier_the_policy_becomes_the_reference_tilted_by_both():
    world = world_for(60, multiplier_init=0.7, multiplier_learning_rate=0.0)
    for step in range(60):
        metrics = world.step([[1]] * 96, step).metrics
    reference = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), [1])
    actor = next_probabilities(world.roles["actor"].model, [1])
    assert metrics["cost/multiplier"] == pytest.approx(0.7)
    assert total_variation(actor, optimum(reference, 0.7)) < 0.05
    assert total_variation(actor, optimum(reference, 0.0)) > 0.15, "costs must count"


@pytest.mark.slow
def test_the_multiplier_finds_the_weight_at_which_the_limit_is_met():
    """The policy's cost falls as the weight grows; where it meets the limit, bisection says."""
    limit, num_steps = -0.15, 110
    reference = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), [1])
    low, high = 0.0, 5.0
    for _ in range(60):
        middle = (low + high) / 2
        over = float((optimum(reference, middle) * COSTS).sum()) > limit
        low, high = (middle, high) if over else (low, middle)
    assert 0.3 < low < 3
    world = world_for(num_steps, limit=limit, multiplier_init=0.2, multiplier_learning_rate=0.1)
    for step in range(num_steps):
        metrics = world.step([[1]] * 96, step).metrics
    actor = next_probabilities(world.roles["actor"].model, [1])
    assert metrics["cost/multiplier"] == pytest.approx(low, rel=0.25)
    assert float((actor * COSTS).sum()) == pytest.approx(limit, abs=0.1)
    assert total_variation(actor, optimum(reference, low)) < 0.08


@pytest.mark.parametrize(
    ("sections", "sentence"),
    [
        ({"cost": {"limit": 1.0}}, "nothing says what a completion costs"),
        ({"cost_critic": {"learning_rate": 1e-3}}, "nothing says what a completion costs"),
        (
            {"cost": {"model_name_or_path": "m", "multiplier_init": 9.0}},
            "`cost.multiplier_init` is above `cost.multiplier_max`",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(sections, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ppo_config(**sections)


def test_metrics_of_costs_would_be_those_of_rewards():
    given = {"reward/f": 1.0, "reward/f/num_errors": 2.0, "perf/time_per_reward/f": 3.0}
    outcome = _OfCosts(lambda batch: Outcome(metrics=given))(Batch({}))
    assert outcome.metrics == {"cost/f": 1.0, "cost/f/num_errors": 2.0, "perf/time_per_cost/f": 3.0}
