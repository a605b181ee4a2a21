"""Evaluation's numbers: distinct-n by hand, KL of equal models exactly zero, KL of others against full logits."""

import pytest
import torch
from tiny_rl import tiny_model

from meshift.config.sections import TrainableConfig
from meshift.data.prompts import Prompt
from meshift.evaluation.completions import complete, distinct_n, mean_kl, mean_reward
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.models.attention import PlainAttention, packed_positions
from meshift.runtime.role import LocalRole

PROMPTS = [Prompt(tokens=[1, 2 + i % 5], text=f"p{i}", columns={}) for i in range(12)]


class Numbers:
    """A tokenizer whose tokens are numbers."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(i) for i in ids)


def role(name, model):
    return LocalRole(name, model, TrainableConfig(logits_chunk=7, max_tokens_per_micro_batch=40))


def completed(**sampling):
    task = SamplingTask(params=SamplingParams(max_new_tokens=6, stop_token_ids=(0,), **sampling), seed=1)
    actor = role("actor", tiny_model()).can_generate(5, str)
    return actor, task, complete(actor, PROMPTS, task, Numbers())


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b a b"], 2, 2 / 3),
        (["a b", "A, b!"], 2, 1 / 2),
        (["a b c", "d"], 2, 1.0),
        (["a a a a"], 1, 1 / 4),
        (["don't stop"], 1, 1.0),
        (["a", ""], 2, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n_is_different_over_all_n_grams(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


def test_completions_keep_the_order_of_prompts_and_leave_the_prompt_out():
    _, _, done = completed()
    for prompt, text, row in zip(PROMPTS, done.texts, done.batch["tokens"].rows(), strict=True):
        assert row[:2].tolist() == prompt.tokens
        assert text == " ".join(str(i) for i in row[2:].tolist())
    assert done.prompts == [p.text for p in PROMPTS]
    assert done.mean_length == sum(len(t.split()) for t in done.texts) / 12


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_k": 4}, {"min_new_tokens": 3}])
def test_equal_models_have_a_kl_of_exactly_zero(sampling):
    actor, task, done = completed(**sampling)
    assert mean_kl(actor, role("reference", tiny_model()), done, task) == 0.0


def test_the_kl_of_different_models_is_the_sum_over_each_completion():
    actor, task, done = completed(temperature=0.8)
    reference = role("reference", tiny_model(seed=3))
    total = 0.0
    for row, length in zip(
        done.batch["tokens"].rows(), done.batch["completion_lengths"].values.tolist(), strict=True
    ):
        parts = []
        for model in (actor.model, reference.model):
            with torch.no_grad():
                logits = model.head(model(row, packed_positions([len(row)]), PlainAttention([len(row)])))
            table = torch.log_softmax(logits[-length - 1 : -1] / 0.8, -1)
            parts.append(table[torch.arange(length), row[-length:]].sum())
        total += float(parts[0] - parts[1])
    assert mean_kl(actor, reference, done, task) == pytest.approx(total / 12, rel=1e-4)
    assert total > 0


def test_the_mean_reward_is_read_at_the_last_tokens():
    _, _, done = completed()
    model = tiny_model("reward", seed=2)
    scores = []
    for row in done.batch["tokens"].rows():
        with torch.no_grad():
            scores.append(model.head(model(row, packed_positions([len(row)]), PlainAttention([len(row)])))[-1])
    assert mean_reward(role("reward", model), done) == pytest.approx(float(torch.stack(scores).mean()), abs=1e-5)
