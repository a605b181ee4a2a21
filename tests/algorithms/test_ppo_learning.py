"""PPO finds optima that are known in advance: the real graph, sampler, trainer and critic on tiny fresh models."""

import torch
from tiny_rl import make_world, ppo_config, tiny_model

from meshift.models.attention import PackedAttention, packed_positions

VOCAB = 8
EOS = 7


def next_probabilities(model, tokens):
    with torch.no_grad():
        hidden = model(torch.tensor(tokens), packed_positions([len(tokens)]), PackedAttention([len(tokens)]))
        return torch.softmax(model.head(hidden[-1:])[0], -1)


def world_config(num_tokens, *, actor_rate=3e-3, decay="linear", **ppo):
    rates = {"lr_scheduler_type": decay}
    return ppo_config(
        actor={"model_name_or_path": "unused", "learning_rate": actor_rate, "logits_chunk": 64, **rates},
        critic={"learning_rate": 5e-3, **rates},
        generation={"max_completion_length": num_tokens},
        ppo={"length_limit_is_end": True, "num_mini_batches": 2, "cliprange_value": None, **ppo},
    )


def test_without_kl_the_greedy_policy_becomes_the_best_sequence():
    """One point for each token in its place; the best of 8^3 sequences earns 3."""
    target, prompt, num_steps = (5, 2, 6), [1], 50

    def reward(completion_ids):
        return [float(sum(a == b for a, b in zip(ids, target, strict=True))) for ids in completion_ids]

    config = world_config(3, kl_coef=0.0, actor_rate=5e-3, num_ppo_epochs=2)
    world = make_world(reward, config, vocab_size=VOCAB, max_steps=num_steps, scale=0.15)
    first = world.step([prompt] * 48).metrics["reward/mean"]
    for step in range(1, num_steps):
        metrics = world.step([prompt] * 48, step).metrics
    greedy = list(prompt)
    for _ in target:
        greedy.append(int(next_probabilities(world.roles["actor"].model, greedy).argmax()))
    assert first < 1.0
    assert tuple(greedy[1:]) == target
    assert metrics["reward/mean"] >= 0.95 * 3
    assert metrics["sync/logprob_diff_max"] < 1e-4


def test_with_kl_the_policy_becomes_the_reference_tilted_by_the_reward():
    """The optimum of E[r] - c KL(pi || ref) over one token is pi* = ref exp(r / c) / Z, for each prompt."""
    prices = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.8, 0.2, -1.0, 0.4])
    prompts, kl_coef, num_steps = [[1], [4, 2]], 0.5, 60

    def reward(completion_ids):
        return [float(prices[ids[0]]) for ids in completion_ids]

    config = world_config(1, kl_coef=kl_coef, actor_rate=2e-3)
    world = make_world(reward, config, vocab_size=VOCAB, max_steps=num_steps, scale=0.2)
    for step in range(num_steps):
        world.step(prompts * 48, step)
    for prompt in prompts:
        reference = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), prompt)
        optimum = torch.softmax(reference.log() + prices / kl_coef, -1)
        actor = next_probabilities(world.roles["actor"].model, prompt)
        assert 0.5 * (reference - optimum).abs().sum() > 0.25, "the optimum must not be where training starts"
        assert 0.5 * (actor - optimum).abs().sum() < 0.05
        greedy_only = torch.softmax(prices / kl_coef, -1)
        assert 0.5 * (actor - greedy_only).abs().sum() > 0.05, "the reference must count"


def test_the_model_learns_to_stop_where_short_answers_pay():
    """Trap 9: the end token is trained, although the same id pads prompts elsewhere: nothing is masked by id."""
    prompt, num_steps = [EOS, EOS, 3], 24  # as a left-padded prompt would look

    def reward(completion_ids):
        return [-float(len(ids)) for ids in completion_ids]

    config = world_config(6, kl_coef=0.0, actor_rate=5e-3)
    world = make_world(reward, config, stops=(EOS,), vocab_size=VOCAB, max_steps=num_steps, scale=0.15)
    before = float(next_probabilities(world.roles["actor"].model, prompt)[EOS])
    lengths = [world.step([prompt] * 32, step).metrics["response_length/mean"] for step in range(num_steps)]
    after = float(next_probabilities(world.roles["actor"].model, prompt)[EOS])
    assert before < 0.3
    assert after > 0.8
    assert lengths[-1] < 0.5 * lengths[0]


def test_an_end_token_carries_gradient_like_any_other():
    """Only the last token, the end itself, has an advantage: its probability must rise."""
    config = world_config(6, kl_coef=0.0, actor_rate=1e-3, whiten_advantages=False, num_mini_batches=1)
    world = make_world(lambda completion_ids: [0.0] * len(completion_ids), config, stops=(EOS,), vocab_size=VOCAB)
    batch = world.step([[EOS, 3]] * 16).batch
    ended = [i for i, cut in enumerate(batch["truncated"].values.tolist()) if not cut]
    one = batch.index(ended[:1])
    tokens = one["tokens"].values.tolist()
    assert tokens[-1] == EOS
    advantages = one["advantages"]
    advantages.values[:] = 0.0
    advantages.values[-1] = 1.0
    actor = world.roles["actor"]
    train = next(call for call in world.graph.calls if call.name == "train_actor")
    one["versions"].values[:] = actor.version
    before = float(next_probabilities(actor.model, tokens[:-1])[EOS])
    actor.train(train.task, one.select(train.reads), step=0)
    assert float(next_probabilities(actor.model, tokens[:-1])[EOS]) > before
