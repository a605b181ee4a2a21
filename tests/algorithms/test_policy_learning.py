"""Each critic-free method finds an optimum that is known in advance, with the real sampler and trainer."""

import pytest
import torch
from tiny_policy import SCHEMAS, make_policy_world, policy_config
from tiny_rl import tiny_model

from meshift.models.attention import PackedAttention, packed_positions

VOCAB = 8
WIDE = {"gspo": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.1}}  # its own bounds are for small learning rates


def next_probabilities(model, tokens):
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), packed_positions([len(tokens)]), PackedAttention([len(tokens)]))
        return torch.softmax(model.head(hidden[-1:])[0], -1)


def world_of(method, reward, num_tokens, *, rate, num_steps, num_generations=8, num_prompts=6, scale=0.2, **keys):
    config = policy_config(
        method,
        actor={
            "model_name_or_path": "unused",
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "logits_chunk": 512,
        },
        data={"dataset_name": "unused", "batch_size": num_prompts},
        generation={"max_completion_length": num_tokens, "num_generations": num_generations},
        **{method: keys},
    )
    return make_policy_world(reward, config, vocab_size=VOCAB, max_steps=num_steps, scale=scale)


@pytest.mark.parametrize("method", [*SCHEMAS, "reinforce_pp baseline"])
def test_the_greedy_policy_becomes_the_best_sequence(method):
    """One point for each token in its place; the best of 8^2 sequences earns 2, a random one a quarter."""
    target, prompt, num_steps = (5, 2), [1], 25
    name, _, baseline = method.partition(" ")
    keys = {
        "kl_coef": 0.0,
        "num_mini_batches": 4,
        **({"baseline": "group"} if baseline else {}),
        **WIDE.get(name, {}),
    }

    def reward(completion_ids):
        return [float(sum(a == b for a, b in zip(ids, target, strict=True))) for ids in completion_ids]

    rate = 3e-3 if name == "cispo" else 5e-3  # nothing holds its four updates back
    world = world_of(name, reward, 2, rate=rate, num_steps=num_steps, scale=0.15, **keys)
    metrics = [world.step([prompt] * 6, step).metrics for step in range(num_steps)]
    greedy = list(prompt)
    for _ in target:
        greedy.append(int(next_probabilities(world.roles["actor"].model, greedy).argmax()))
    assert metrics[0]["reward/mean"] < 0.8
    assert tuple(greedy[1:]) == target
    assert sum(m["reward/mean"] for m in metrics[-4:]) / 4 >= 0.85 * 2
    assert max(m["sync/logprob_diff_max"] for m in metrics) < 1e-4


@pytest.mark.parametrize(
    ("method", "keys", "factor"),
    [
        ("rloo", {}, 1.0),
        ("remax", {}, 1.0),
        ("dr_grpo", {"kl_in": "reward", "kl_estimator": "k1"}, 1.0),
        ("dr_grpo", {"kl_in": "loss", "kl_estimator": "k1"}, 4 / 3),
    ],
)
def test_with_kl_the_policy_becomes_the_reference_tilted_by_the_reward(method, keys, factor):
    """The optimum of E[r] - c KL(pi || ref) over one token is pi* = ref exp(r / c) / Z, for each prompt.

    A baseline that holds the completion's own score shrinks the reward's gradient by 1 - 1/G, here 3/4, but not
    that of a KL in the loss: as if c were 4/3 of what it is.
    """
    prices = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.8, 0.2, -1.0, 0.4])
    prompts, kl_coef, num_steps = [[1], [4, 2]], 0.5, 60

    def reward(completion_ids):
        return [float(prices[ids[0]]) for ids in completion_ids]

    world = world_of(
        method,
        reward,
        1,
        rate=2e-3,
        num_steps=num_steps,
        num_generations=4,
        num_prompts=48,
        kl_coef=kl_coef,
        **keys,
    )
    for step in range(num_steps):
        world.step(prompts * 24, step)
    for prompt in prompts:
        reference = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), prompt)
        optimum = torch.softmax(reference.log() + prices / (kl_coef * factor), -1)
        actor = next_probabilities(world.roles["actor"].model, prompt)
        assert 0.5 * (reference - optimum).abs().sum() > 0.2, "the optimum must not be where training starts"
        assert 0.5 * (actor - optimum).abs().sum() < 0.05
