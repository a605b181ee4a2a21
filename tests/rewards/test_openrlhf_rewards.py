"""Reward functions as users of OpenRLHF write them."""

import pytest
import torch
from reward_batches import rollout, score

from meshift.errors import RewardError


def test_queries_begin_with_their_prompts_and_keep_special_tokens():
    def reward_func(queries, prompts, labels, **kwargs):
        assert kwargs == {}
        assert prompts == ["ab<end>", "c"]
        assert queries == ["ab<end>de<end>", "cfga"]
        assert labels == ["x", "y"]
        return torch.tensor([float(len(q) - len(p)) for q, p in zip(queries, prompts, strict=True)])

    batch = rollout(prompts=["abh", "c"], completions=["deh", "fga"], label=["x", "y"])
    assert score((reward_func, 1.0), batch=batch)[0] == [7.0, 3.0]


def test_a_query_begins_with_its_prompt_even_where_decoding_joins_tokens():
    """Some tokenizers write a token differently after another one."""
    from reward_batches import decode

    from meshift.rewards.functions import RewardFunctions, WeightedFunction

    def reward_func(queries, prompts, labels):
        return [float(q == p + "de") for q, p in zip(queries, prompts, strict=True)]

    functions = [WeightedFunction(name="r", function=reward_func, weight=1.0)]
    joined = RewardFunctions(functions=functions, decode=lambda ids: decode(ids).replace("bd", "D"))
    scores = joined(rollout(prompts=["ab", "ab"], completions=["de", "de"])).batch["function_scores"]
    assert scores.values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("columns", "labels"),
    [
        ({"answer": ["1", "2"], "ground_truth": ["3", "4"]}, ["1", "2"]),
        ({"reward_model": [{"ground_truth": "5"}, {}]}, ["5", ""]),
        ({}, ["", ""]),
    ],
)
def test_labels_are_the_datas_answers(columns, labels):
    def reward_func(queries, prompts, labels):
        seen.append(labels)
        return [0.0, 0.0]

    seen = []
    score((reward_func, 1.0), batch=rollout(**columns))
    assert seen == [labels]


def test_a_dictionary_has_rewards_scores_and_logs():
    def reward_func(queries, prompts, labels):
        return {
            "rewards": torch.tensor([2.0, -1.0]),
            "scores": [1.0, False],
            "extra_logs": {"hits": torch.tensor([1, 0]), "format": 0.75, "texts": queries},
        }

    scores, metrics = score((reward_func, 0.5))
    assert scores == [1.0, -0.5]
    assert metrics == {
        "reward/reward_func": 0.5,
        "reward/reward_func/scores": 0.5,
        "reward/reward_func/hits": 0.5,
        "reward/reward_func/format": 0.75,
    }


@pytest.mark.parametrize("result", [[1.0, 2.0], (1, 2), {"scores": [1.0, 2.0]}, torch.tensor([1.0, 2.0]).double()])
def test_tensors_lists_and_scores_alone_are_taken(result):
    def reward_func(queries, prompts, labels):
        return result

    assert score((reward_func, 1.0))[0] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ({"reward": [1.0, 2.0]}, r"returned a dictionary of \['reward'\] without 'rewards' or 'scores'"),
        ({"rewards": [1.0]}, "returned 1 values for 2 completions"),
        ({"rewards": [1.0] * 3}, "returned 3 values for 1 completions on sample 0"),
        (torch.tensor([1.0, float("nan")]), "returned nan on sample 1"),
        ([1.0, None], "returned None, which is no number, on sample 1"),
        (torch.tensor(1.0), "returned Tensor instead of a list"),
    ],
)
def test_anything_else_is_refused(result, sentence):
    def reward_func(queries, prompts, labels):
        return result

    with pytest.raises(RewardError, match=f"reward_func {sentence}"):
        score((reward_func, 1.0))
