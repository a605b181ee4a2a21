"""Rewards of every token in PPO: what is read, what is paid where, and that it is learned from."""

import pytest
import torch
from tiny_choice import VOCAB, next_probabilities
from tiny_rl import make_world, ppo_config, random_rollout, tiny_model

from meshift.algorithms.ppo import PPO
from meshift.batch import Batch, Outcome, Ragged
from meshift.config.sections import TrainableConfig
from meshift.errors import ConfigError
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.training.engine import TrainingEngine
from meshift.training.readings import SequenceScores, TokenScores

PLAIN = {"value_norm": "none", "whiten_advantages": False}
MODEL = {"model_name_or_path": "unused", "per_token": True}


def test_a_token_is_worth_what_the_model_says_of_the_text_that_ends_with_it():
    batch = random_rollout(5)
    engine = TrainingEngine(tiny_model("reward"), TrainableConfig(max_tokens_per_micro_batch=20), trainable=False)
    scores = engine.infer(TokenScores(), batch)["process_scores"]
    assert scores.lengths.tolist() == batch["completion_lengths"].values.tolist()
    for tokens, found in zip(batch["tokens"].rows(), scores.rows(), strict=True):
        ends = range(len(tokens) - len(found) + 1, len(tokens) + 1)
        beginnings = Batch({"tokens": Ragged.from_rows([tokens[:end].tolist() for end in ends], torch.int64)})
        assert torch.allclose(engine.infer(SequenceScores(), beginnings)["scores"].values, found, atol=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_every_token_is_paid_its_own_reward_and_the_last_one_the_outcomes_too(gamma):
    lengths = torch.tensor([3, 2])
    config = ppo_config(
        ppo={**PLAIN, "kl_coef": 0.4, "gamma": gamma, "reward_clip": 5.0, "length_limit_is_end": True},
        reward={**MODEL, "weight": 2.0, "functions": [{"function": "unused:unused"}]},
    )
    process = [[0.5, -1.0, 0.25], [9.0, 0.0]]
    ref = torch.linspace(-3, -1, 5)
    batch = Batch(
        {
            "process_scores": Ragged.from_rows(process, torch.float32),
            "function_scores": Ragged.scalars(torch.tensor([1.0, -2.0])),
            "values": Ragged(torch.zeros(7), lengths + 1),
            "logprobs": Ragged(ref + 0.25, lengths),
            "ref_logprobs": Ragged(ref, lengths),
            "truncated": Ragged.scalars([False, True]),
        }
    )
    outcome = PPO(config, SamplingTask(params=SamplingParams(max_new_tokens=3), seed=0)).advantages(batch)
    for row, given, last in zip(outcome.batch["returns"].rows(), process, (1.0, -2.0), strict=True):
        paid = [min(2.0 * value, 5.0) - 0.4 * 0.25 for value in given]
        paid[-1] += last
        expected = [sum(gamma ** (s - t) * paid[s] for s in range(t, len(paid))) for t in range(len(paid))]
        assert row.tolist() == pytest.approx(expected, rel=1e-5)
    assert outcome.batch["scores"].values.tolist() == pytest.approx([2.0 * -0.25 + 1.0, 18.0 - 2.0])
    assert outcome.metrics["reward/reward_model"] == pytest.approx((-0.25 + 9.0) / 2)


def test_a_completion_that_is_cut_off_keeps_what_its_tokens_earned():
    lengths = torch.tensor([2])
    batch = Batch(
        {
            "process_scores": Ragged.from_rows([[1.0, 2.0]]),
            "values": Ragged(torch.tensor([0.0, 0.0, 50.0]), lengths + 1),
            "logprobs": Ragged(torch.zeros(2), lengths),
            "ref_logprobs": Ragged(torch.zeros(2), lengths),
            "truncated": Ragged.scalars([True]),
        }
    )
    for penalty, last in ((None, 52.0), (0.5, 51.5)):
        config = ppo_config(ppo={**PLAIN, "missing_eos_penalty": penalty}, reward={**MODEL, "functions": []})
        algorithm = PPO(config, SamplingTask(params=SamplingParams(max_new_tokens=2), seed=0))
        assert algorithm.advantages(batch).batch["returns"].values.tolist() == pytest.approx([last + 1.0, last])


class PlacedTokens:
    """A reward model that gives one point for each token in its place."""

    target = (5, 2, 6)
    version = 0

    def infer(self, task, batch):
        """Of the calls of a role this is the only one that PPO makes of its reward model."""
        rows = []
        for tokens, length in zip(
            batch["tokens"].rows(), batch["completion_lengths"].values.tolist(), strict=True
        ):
            said = tokens[len(tokens) - length :].tolist()
            rows.append([float(a == b) for a, b in zip(said, self.target, strict=True)])
        return Outcome(batch=Batch({task.key: Ragged.from_rows(rows)}))


def test_with_no_look_ahead_each_token_is_learned_from_its_own_reward():
    """gamma is nearly zero: only a reward that is paid where it is earned can teach all three tokens."""
    num_steps, how = 40, {"lr_scheduler_type": "linear"}
    config = ppo_config(
        actor={"model_name_or_path": "unused", "learning_rate": 5e-3, "logits_chunk": 64, **how},
        critic={"learning_rate": 5e-3, **how},
        generation={"max_completion_length": 3},
        reward=MODEL,
        ppo={"kl_coef": 0.0, "gamma": 1e-6, "num_mini_batches": 2, "length_limit_is_end": True},
    )
    world = make_world(None, config, vocab_size=VOCAB, max_steps=num_steps, scale=0.15)
    world.roles["reward"] = PlacedTokens()
    metrics = [world.step([[1]] * 48, step).metrics for step in range(num_steps)]
    greedy = [1]
    for _ in range(3):
        greedy.append(int(next_probabilities(world.roles["actor"].model, greedy).argmax()))
    assert metrics[0]["reward/mean"] < 1.0
    assert tuple(greedy[1:]) == PlacedTokens.target
    assert metrics[-1]["reward/mean"] >= 0.9 * 3


def test_process_rewards_without_a_reward_model_are_refused():
    with pytest.raises(ConfigError, match="per_token is of a reward model"):
        ppo_config(reward={"per_token": True, "functions": [{"function": "unused:unused"}]})
