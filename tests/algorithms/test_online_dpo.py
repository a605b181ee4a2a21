"""Online DPO: which pairs completions make, what is trained on them, and optima that are known in advance."""

import math
from itertools import permutations

import pytest
import torch
from tiny_choice import VOCAB, choice_world, next_probabilities, total_variation
from tiny_rl import tiny_model

from meshift.algorithms.online_dpo import pairs_of
from meshift.errors import ConfigError

PRICES = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.8, 0.2, -1.0, 0.4])


def priced(completion_ids):
    return [float(PRICES[ids[0]]) for ids in completion_ids]


def equal(completion_ids):
    return [1.0 for _ in completion_ids]


def test_pairs_are_best_and_worst_or_every_two_that_differ():
    scores = torch.tensor([1.0, 3.0, 3.0, 0.0, 2.0, 2.0, 2.0, 2.0, 5.0, 1.0, 9.0, 4.0])
    judged = torch.tensor([True] * 8 + [True, True, False, True])
    assert pairs_of(scores, judged, 4, best_worst=True) == [(1, 3), (8, 9)]
    naive = {
        (i, j)
        for start in (0, 4, 8)
        for i, j in permutations(range(start, start + 4), 2)
        if judged[i] and judged[j] and scores[i] > scores[j]
    }
    found = pairs_of(scores, judged, 4, best_worst=False)
    assert set(found) == naive
    assert len(found) == len(naive)
    assert pairs_of(scores, torch.zeros(12, dtype=torch.bool), 4, best_worst=True) == []


def test_a_pair_holds_texts_of_one_prompt_with_their_own_scores():
    world = choice_world("online_dpo", priced, 2, num_steps=1, num_generations=5, pairs="all", labels="soft")
    prompts = [[1], [4, 2], [3, 3, 3]]
    batch = world.step(prompts).batch
    assert len(batch) > len(prompts)
    for row in range(len(batch)):
        one = batch.index([row])
        size = int(one["num_prompt_tokens"].values)
        chosen, rejected = one["chosen"].values.tolist(), one["rejected"].values.tolist()
        assert chosen[:size] == rejected[:size] == prompts[int(one["chosen_index"].values) // 5]
        worth = [float(PRICES[text[size]]) for text in (chosen, rejected)]
        assert [float(one[f"{side}_scores"].values) for side in ("chosen", "rejected")] == pytest.approx(worth)
        assert worth[0] > worth[1]
        lost = 1 / (1 + math.exp(worth[0] - worth[1]))
        assert float(one["flip_probability"].values) == pytest.approx(lost, rel=1e-5)


def test_completions_that_all_score_the_same_would_move_the_policy_by_the_momentum_of_steps_before():
    rewards = iter([priced, equal, equal, priced])

    def reward(completion_ids):
        return next(rewards)(completion_ids)

    world = choice_world("online_dpo", reward, 1, num_steps=9)
    actor, moved, versions = world.roles["actor"], [], []
    for step in range(4):
        before = {name: p.detach().clone() for name, p in actor.model.named_parameters()}
        metrics = world.step([[1], [2], [3]], step).metrics
        moved.append(any(not torch.equal(before[name], p) for name, p in actor.model.named_parameters()))
        versions.append(actor.version)
        assert (metrics["sampling/num_pairs"] == 0) == (not moved[-1])
        assert (metrics["reward/frac_reward_zero_std"] == 1) == (not moved[-1])
        assert metrics.get("skipped_updates", 0) == (0 if moved[-1] else 1)
        assert ("grad_norm" in metrics) == moved[-1]
    assert moved == [True, False, False, True]
    assert versions == [1, 1, 1, 2]


def test_both_sides_would_be_read_at_another_temperature_than_they_were_drawn_with():
    """With the reference as actor the first loss is log 2 in any case; the log-probs must be the drawn ones."""
    generation = {"temperature": 0.5}
    world = choice_world("online_dpo", priced, 1, num_steps=1, num_generations=16, generation=generation)
    outcome = world.step([[1], [4, 2]])
    model = tiny_model(vocab_size=VOCAB, scale=0.2)
    for row, ref in zip(outcome.batch["chosen"].rows(), outcome.batch["ref_chosen_logps"].values, strict=True):
        *prompt, token = row.tolist()
        assert float(next_probabilities(model, prompt, 0.5)[token].log()) == pytest.approx(float(ref), abs=1e-4)
    assert outcome.metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert outcome.metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(("num_rounds", "moved"), [(None, []), (2, [2, 4]), (1, [1, 2, 3, 4])])
def test_the_reference_becomes_the_actor_after_each_round(num_rounds, moved):
    world = choice_world("online_dpo", priced, 1, num_steps=4, steps_per_round=num_rounds)
    reference, actor = (world.roles[name] for name in ("reference", "actor"))
    last = {n: w.clone() for n, w in reference.master_weights().items()}
    for step in range(4):
        metrics = world.step([[1], [4, 2]], step).metrics
        now = reference.master_weights()
        assert any(not torch.equal(now[n], last[n]) for n in last) == (step + 1 in moved)
        if step + 1 in moved:
            assert all(torch.equal(now[n], w) for n, w in actor.master_weights().items())
        assert metrics["sampling/round"] == (1 if num_rounds is None else step // num_rounds + 1)
        last = {n: w.clone() for n, w in now.items()}


def test_soft_labels_lead_to_the_reference_tilted_by_the_reward():
    """Where the better of two wins with probability sigmoid(r - r'), DPO's optimum is ref exp(r / beta) / Z."""
    prompts, beta, num_steps = [[1], [4, 2]], 0.5, 60
    keys = {"beta": beta, "labels": "soft", "pairs": "all"}
    world = choice_world(
        "online_dpo", priced, 1, rate=3e-3, num_steps=num_steps, num_generations=4, num_prompts=48, **keys
    )
    for step in range(num_steps):
        world.step(prompts * 24, step)
    for prompt in prompts:
        reference = next_probabilities(tiny_model(vocab_size=VOCAB, scale=0.2), prompt)
        optimum = torch.softmax(reference.log() + PRICES / beta, -1)
        actor = next_probabilities(world.roles["actor"].model, prompt)
        assert total_variation(reference, optimum) > 0.2, "the optimum must not be where training starts"
        assert total_variation(actor, optimum) < 0.05


def test_rounds_go_further_than_one_reference_lets_them():
    """Each round starts from a reference that is better: the tilt of one round is laid on that of the last."""
    prompts, num_steps = [[1], [4, 2]], 40
    reached = {}
    for every in (None, 10):
        keys = {"beta": 1.0, "labels": "soft", "pairs": "all", "steps_per_round": every}
        world = choice_world(
            "online_dpo", priced, 1, rate=5e-3, num_steps=num_steps, num_generations=4, num_prompts=24, **keys
        )
        for step in range(num_steps):
            metrics = world.step(prompts * 12, step).metrics
        reached[every] = metrics["reward/mean"]
    assert reached[10] > reached[None] + 0.1


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"online_dpo": {"loss_type": "ipo", "labels": "soft"}}, "labels: soft is of loss_type sigmoid"),
        (
            {"online_dpo": {"steps_per_round": 2}, "reference": {"sync_ref_model": True}},
            "keep one of them",
        ),
        ({"generation": {"num_generations": 1}}, "set it to at least 2"),
        ({"online_dpo": {"num_mini_batches": 7}}, "is more than a step's 6 pairs"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        choice_world("online_dpo", priced, 1, num_steps=1, sections=keys)
