"""RAFT: which completions are kept, that exactly these are imitated, and an optimum that is known in advance."""

import pytest
import torch
from tiny_choice import VOCAB, choice_world, next_probabilities
from tiny_rl import tiny_model

from meshift.algorithms.losses import TokenCrossEntropy
from meshift.algorithms.raft import best_rows
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.errors import ConfigError
from meshift.training.engine import TrainingEngine

TARGET = (5, 2)


def places(completion_ids):
    return [float(sum(a == b for a, b in zip(ids, TARGET, strict=False))) for ids in completion_ids]


def test_the_best_of_each_block_are_kept_and_the_first_of_those_that_tie():
    worth = torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0, 2.0, 9.0, 2.0])
    usable = torch.tensor([True, True, True, True, True, True, False, True])
    assert best_rows(worth, usable, 4, 1) == [1, 4]
    assert best_rows(worth, usable, 4, 2) == [1, 2, 4, 5]
    assert best_rows(worth, usable, 4, 4) == [0, 1, 2, 3, 4, 5, 7]


def test_a_step_would_learn_from_something_else_than_the_best_completions():
    """The gradient is that of maximum likelihood on these texts, through another loss and reading."""
    world = choice_world("raft", places, 2, num_steps=1, num_generations=6, rate=1e-9)
    batch = world.step([[1], [4, 2], [3, 3, 3]]).batch
    assert len(batch) == 3
    rows = [row.tolist() for row in batch["tokens"].rows()]
    lengths = batch["completion_lengths"].values.tolist()
    masks = [[i >= len(row) - n for i in range(len(row))] for row, n in zip(rows, lengths, strict=True)]
    texts = Batch(
        {
            "tokens": Ragged.from_rows(rows, torch.int64),
            "loss_mask": Ragged.from_rows(masks, torch.bool),
        }
    )
    loss = next(call for call in world.graph.calls if call.name == "train_actor").task.loss
    gradients = []
    for one, given in ((TokenCrossEntropy(), texts), (loss, batch)):
        engine = TrainingEngine(tiny_model(vocab_size=VOCAB, scale=0.2), TrainableConfig(), trainable=True)
        engine.accumulate(one, given)
        gradients.append({name: p.grad for name, p in engine.model.named_parameters()})
    for name, expected in gradients[0].items():
        assert torch.allclose(gradients[1][name], expected, rtol=1e-4, atol=1e-7), name


def good(completion_ids):
    return [3.0 for _ in completion_ids]


def test_what_scores_too_little_would_be_imitated():
    rewards = iter([good, places])

    def reward(completion_ids):
        return next(rewards)(completion_ids)

    world = choice_world("raft", reward, 2, num_steps=9, min_score=2.5)
    assert world.step([[1], [2]]).metrics["sampling/num_kept"] == 2
    before = {name: p.detach().clone() for name, p in world.roles["actor"].model.named_parameters()}
    outcome = world.step([[1], [2]], 1)  # when the optimizer has momentum
    assert outcome.metrics["sampling/num_kept"] == 0
    assert outcome.batch["trained"].values.tolist() == [False]
    assert all(torch.equal(before[name], p) for name, p in world.roles["actor"].model.named_parameters())
    assert (world.roles["actor"].version, outcome.metrics["actor/skipped_updates"]) == (1, 1)
    world = choice_world("raft", places, 2, num_steps=1, num_generations=64, num_kept=64, min_score=1)
    kept = world.step([[1]]).batch
    assert 0 < len(kept) < 64
    assert kept["scores"].values.min() >= 1


def test_kl_to_the_reference_would_not_count_in_what_is_best():
    """With a KL that outweighs any score, the kept completion is the one that the actor overrates least."""
    world = choice_world("raft", places, 1, num_steps=1, num_generations=8, kl_coef=1e6)
    reference = world.roles["reference"].model
    with torch.no_grad():
        reference.head.weight.add_(
            0.3 * torch.randn(reference.head.weight.shape, generator=torch.Generator().manual_seed(1))
        )
    graph_batch = world.step([[1]] * 4).batch
    actor = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), [1]).log()
    gap = actor - next_probabilities(reference, [1]).log()
    best = int(gap.argmin())
    kept = [row.tolist()[-1] for row in graph_batch["tokens"].rows()]
    assert len(kept) == 4
    assert kept.count(best) >= 2, "of eight draws the best token is mostly there"
    assert float(gap[kept].mean()) < float((actor.exp() * gap).sum())


def test_the_greedy_policy_becomes_the_best_sequence():
    """One point for each token in its place; the best of 8^2 sequences earns 2, a random one a quarter."""
    num_steps = 30
    world = choice_world("raft", places, 2, num_steps=num_steps, num_generations=8, num_mini_batches=2, rate=5e-3)
    metrics = [world.step([[1]] * 6, step).metrics for step in range(num_steps)]
    greedy = [1]
    for _ in TARGET:
        greedy.append(int(next_probabilities(world.roles["actor"].model, greedy).argmax()))
    assert metrics[0]["reward/mean"] < 0.8
    assert tuple(greedy[1:]) == TARGET
    assert sum(m["reward/mean"] for m in metrics[-4:]) / 4 >= 0.85 * 2
    assert all(m["kept/reward/mean"] >= m["reward/mean"] for m in metrics)


def test_more_completions_than_are_drawn_cannot_be_kept():
    with pytest.raises(ConfigError, match=r"`raft.num_kept` = 5 is more than `generation.num_generations` = 4"):
        choice_world("raft", places, 2, num_steps=1, num_kept=5)
