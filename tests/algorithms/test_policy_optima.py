"""With KL to a reference the policy comes to rest where arithmetic says that it must, far from where it began.

One token is drawn for each prompt. A policy's expected gradient is then a finite sum, and where it is zero follows
from the reference, the prices of tokens, and the method's formula alone.
"""

from itertools import product

import pytest
import torch
from test_policy_learning import VOCAB, next_probabilities, world_of
from tiny_rl import tiny_model

PRICES = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.8, 0.2, -1.0, 0.4], dtype=torch.float64)
PROMPTS, GROUP, NUM_STEPS = [[1], [4, 2]], 4, 60


def priced(completion_ids):
    return [float(PRICES[ids[0]]) for ids in completion_ids]


def references():
    model = tiny_model(vocab_size=VOCAB, scale=0.2)
    found = [next_probabilities(model, prompt).double() for prompt in PROMPTS]
    return [one / one.sum() for one in found]


def trained(method, *, rate=2e-3, **keys):
    """The policy's probabilities after training, for each prompt."""
    world = world_of(
        method, priced, 1, rate=rate, num_steps=NUM_STEPS, num_generations=GROUP, num_prompts=48, **keys
    )
    for step in range(NUM_STEPS):
        world.step(PROMPTS * 24, step)
    return [next_probabilities(world.roles["actor"].model, prompt).double() for prompt in PROMPTS]


def apart(one, other):
    """Total variation."""
    return float(0.5 * (one - other).abs().sum())


def stands_still(reference, kl_coef):
    """GRPO: where E[A grad log pi] = c E[grad k3], the expectation over all groups of tokens.

    Per token y that is pi_y E[A | y] = c (pi_y - ref_y), reached by following log pi.
    """
    groups = torch.tensor(list(product(range(VOCAB), repeat=GROUP)))
    rewards = PRICES[groups]
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    first = torch.nn.functional.one_hot(groups[:, 0], VOCAB).double() * advantages[:, :1]
    policy = reference
    for _ in range(2000):
        pull = policy[groups].prod(1) @ first / policy - kl_coef * (1 - reference / policy)
        policy = torch.softmax(policy.log() + 0.5 * pull, -1)
    assert float(pull.abs().max()) < 1e-9, "it must have come to rest"
    return policy


@pytest.mark.parametrize("kl_coef", [0.04, 0.5])
def test_the_default_objective_of_grpo_stands_still_elsewhere(kl_coef):
    """Advantages over the group's std, k3 in the loss; 0.04 is the default coefficient."""
    keys = {} if kl_coef == 0.04 else {"kl_coef": kl_coef}
    for actor, reference in zip(trained("grpo", rate=3e-3, **keys), references(), strict=True):
        expected = stands_still(reference, kl_coef)
        assert apart(reference, expected) > 0.2
        assert apart(actor, expected) < 0.03
        for other in (kl_coef / 2, 2 * kl_coef):
            assert apart(actor, expected) < 0.8 * apart(actor, stands_still(reference, other))


def test_reinforce_pp_does_not_become_the_reference_tilted_by_the_reward():
    """With k1 in the reward all completions earn the same at ref exp(r / c) / Z, however that is normalised."""
    for actor, reference in zip(trained("reinforce_pp", kl_coef=0.5), references(), strict=True):
        expected = torch.softmax(reference.log() + PRICES / 0.5, -1)
        assert apart(reference, expected) > 0.2
        assert apart(actor, expected) < 0.03


def spread_of(std, kl_coef):
    """The std of centred scores over a step, where the policies are those that this std leads to."""
    shrunk = 1 - 1 / GROUP
    policies = [torch.softmax(ref.log() + PRICES * shrunk / (std * kl_coef), -1) for ref in references()]
    variances = [float(p @ PRICES.square() - (p @ PRICES) ** 2) for p in policies]
    return policies, (shrunk * sum(variances) / len(variances)) ** 0.5


def test_the_baseline_form_of_reinforce_pp_becomes_another_tilt():
    """Scores less their group's mean, over their std s in the step; k2 in the loss: c becomes c s G / (G - 1).

    s depends on the policies and they on it; bisection finds the largest s at which both agree.
    """
    kl_coef, low, high = 1.5, 0.1, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spread_of(middle, kl_coef)[1] > middle else (low, middle)
    optimum = spread_of(low, kl_coef)[0]
    found = trained("reinforce_pp", baseline="group", kl_coef=kl_coef)
    for actor, expected, reference in zip(found, optimum, references(), strict=True):
        tilt = torch.softmax(reference.log() + PRICES / kl_coef, -1)
        assert apart(reference, expected) > 0.2
        assert apart(actor, expected) < 0.05 < apart(actor, tilt)
