"""Methods on completions that older weights drew find the optima that they find on fresh ones."""

import pytest
import torch
from test_policy_learning import VOCAB, next_probabilities
from tiny_ahead import ahead_of
from tiny_policy import make_policy_world, policy_config
from tiny_rl import make_world, ppo_config, tiny_model

BEHIND = 2
TOKEN = {"recompute_logprobs": True, "importance_correction": "token"}
SEQUENCE = {"recompute_logprobs": True, "importance_correction": "sequence"}
PRICES = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.8, 0.2, -1.0, 0.4])


def price(completion_ids):
    return [float(PRICES[ids[0]]) for ids in completion_ids]


def actor_with(rate):
    schedule = {"lr_scheduler_type": "linear", "logits_chunk": 512}
    return {"model_name_or_path": "unused", "learning_rate": rate, **schedule}


def distance(one, other):
    return float(0.5 * (one - other).abs().sum())


def check_tilted(world, metrics, kl_coef, prompts):
    """pi* = ref exp(r / c) / Z, for each prompt; most steps were on what older weights had drawn."""
    assert metrics[-1]["off_policy/staleness_mean"] == BEHIND
    assert min(m["off_policy/ess"] for m in metrics) < 0.99, "the weights must have something to do"
    for prompt in prompts:
        reference = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), prompt)
        optimum = torch.softmax(reference.log() + PRICES / kl_coef, -1)
        assert distance(reference, optimum) > 0.2, "the optimum must not be where training starts"
        assert distance(next_probabilities(world.roles["actor"].model, prompt), optimum) < 0.06


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("rloo", SEQUENCE),
        pytest.param("dr_grpo", {**TOKEN, "kl_in": "reward", "kl_estimator": "k1"}, marks=pytest.mark.slow),
        pytest.param("remax", TOKEN, marks=pytest.mark.slow),
    ],
)
def test_two_steps_late_the_policy_still_becomes_the_reference_tilted_by_the_reward(method, keys):
    prompts, kl_coef, steps = [[1], [4, 2]], 0.5, 50
    config = policy_config(
        method,
        max_staleness=BEHIND,
        actor=actor_with(2e-3),
        data={"dataset_name": "unused", "batch_size": 32},
        generation={"max_completion_length": 1, "num_generations": 4},
        **{method: {"kl_coef": kl_coef, "importance_cap": None, **keys}},
    )
    world = make_policy_world(price, config, vocab_size=VOCAB, max_steps=steps, scale=0.2)
    run = ahead_of(world, prompts * 16, BEHIND, steps)
    check_tilted(world, [run(step).metrics for step in range(steps)], kl_coef, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("cap", [None, 1.5])
def test_two_steps_late_ppo_still_finds_that_policy(cap):
    prompts, kl_coef, steps = [[1], [4, 2]], 0.5, 60
    config = ppo_config(
        max_staleness=BEHIND,
        actor=actor_with(2e-3),
        critic={"learning_rate": 5e-3, "lr_scheduler_type": "linear"},
        generation={"max_completion_length": 1},
        ppo={
            "length_limit_is_end": True,
            "num_mini_batches": 2,
            "cliprange_value": None,
            "kl_coef": kl_coef,
            "importance_cap": cap,
            **TOKEN,
        },
    )
    world = make_world(price, config, vocab_size=VOCAB, max_steps=steps, scale=0.2)
    run = ahead_of(world, prompts * 48, BEHIND, steps)
    check_tilted(world, [run(step).metrics for step in range(steps)], kl_coef, prompts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("grpo", {}),  # the sampler's log-probs as old ones: the ratio corrects, the clip is about older weights
        ("grpo", TOKEN),
        ("dapo", TOKEN),
        ("gspo", {**SEQUENCE, "clip_ratio_low": 0.1, "clip_ratio_high": 0.1}),
        ("cispo", TOKEN),
        ("reinforce_pp", TOKEN),
    ],
)
def test_two_steps_late_the_greedy_policy_still_becomes_the_best_sequence(method, keys):
    """One point for each token in its place; the best of 8^2 sequences earns 2, a random one a quarter."""
    target, prompt = (5, 2), [1]
    steps = 30 if keys else 60  # held near the weights of two steps before, the policy moves more slowly

    def reward(completion_ids):
        return [float(sum(a == b for a, b in zip(ids, target, strict=True))) for ids in completion_ids]

    config = policy_config(
        method,
        max_staleness=BEHIND,
        actor=actor_with(3e-3 if method == "cispo" else 5e-3),
        data={"dataset_name": "unused", "batch_size": 6},
        generation={"max_completion_length": 2, "num_generations": 8},
        **{method: {"kl_coef": 0.0, "num_mini_batches": 4, **keys}},
    )
    world = make_policy_world(reward, config, vocab_size=VOCAB, max_steps=steps, scale=0.15)
    run = ahead_of(world, [prompt] * 6, BEHIND, steps)
    metrics = [run(step).metrics for step in range(steps)]
    greedy = list(prompt)
    for _ in target:
        greedy.append(int(next_probabilities(world.roles["actor"].model, greedy).argmax()))
    assert metrics[0]["reward/mean"] < 0.8
    assert tuple(greedy[1:]) == target
    assert sum(m["reward/mean"] for m in metrics[-4:]) / 4 >= 0.85 * 2
