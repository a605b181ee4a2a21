"""Reward functions as users of verl write them: one sample a call, or batches."""

import asyncio

import numpy as np
import pytest
from reward_batches import rollout, score

from meshift.errors import RewardError

SAMPLES = {
    "data_source": ["letters", "more letters"],
    "reward_model": [{"style": "rule", "ground_truth": "d"}, {"style": "rule", "ground_truth": "x"}],
    "extra_info": [{"index": 7}, {"index": 8}],
}


def test_each_sample_is_a_call_with_verls_four_arguments():
    seen = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        seen.append((data_source, solution_str, ground_truth, extra_info))
        return float(solution_str.startswith(ground_truth))

    scores, metrics = score((compute_score, 2.0), batch=rollout(**SAMPLES))
    assert scores == [2.0, 0.0]
    assert metrics == {"reward/compute_score": 0.5}
    assert seen == [("letters", "de", "d", {"index": 7}), ("more letters", "fga", "x", {"index": 8})]


def test_further_keys_of_a_result_are_metrics():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        right = solution_str.startswith(ground_truth)
        result = {"score": 1.0 if right else -1.0, "acc": right, "pred": solution_str, "length": len(solution_str)}
        return result | ({"bonus": 3} if right else {})

    scores, metrics = score((compute_score, 1.0), batch=rollout(**SAMPLES))
    assert scores == [1.0, -1.0]
    assert metrics == {
        "reward/compute_score": 0.0,
        "reward/compute_score/acc": 0.5,
        "reward/compute_score/length": 2.5,
        "reward/compute_score/bonus": 3.0,
    }


@pytest.mark.parametrize("name", ["answer", "ground_truth", "label"])
def test_the_ground_truth_is_found_under_its_other_names(name):
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        assert (data_source, extra_info) == ("", {})
        return float(ground_truth)

    assert score((compute_score, 1.0), batch=rollout(**{name: ["3", 4]}))[0] == [3.0, 4.0]


def test_rows_of_one_prompt_do_not_see_each_others_changes():
    shared = {"seen": 0}

    def compute_score(data_source, solution_str, ground_truth, extra_info):
        extra_info["seen"] += 1
        return extra_info["seen"]

    assert score((compute_score, 1.0), batch=rollout(answer=["", ""], extra_info=[shared, shared]))[0] == [1, 1]


def test_batches_get_lists_and_return_numbers_or_dictionaries():
    def scores_of(data_sources, solution_strs, ground_truths, extra_infos):
        assert data_sources == SAMPLES["data_source"]
        assert extra_infos == SAMPLES["extra_info"]
        first = {"score": np.float32(0.5), "acc": 1}
        return [first, float(ground_truths[1] == "x") + len(solution_strs[1])]

    scores, metrics = score((scores_of, 1.0), batch=rollout(**SAMPLES))
    assert scores == [0.5, 4.0]
    assert metrics == {"reward/scores_of": 2.25, "reward/scores_of/acc": 1.0}


def test_async_functions_wait_for_all_samples_at_the_same_time_but_not_for_too_many():
    running, most = 0, 0

    async def compute_score(solution_str, ground_truth, **kwargs):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return len(solution_str)

    batch = rollout(prompts=["a"] * 100, completions=["b"] * 60 + ["cc"] * 40, answer=[0] * 100)
    assert score((compute_score, 1.0), batch=batch)[0] == [1.0] * 60 + [2.0] * 40
    assert most == 64


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (None, "returned None, which is no number, on sample 1"),
        ("1.0", "returned '1.0', which is no number, on sample 1"),
        (float("nan"), "returned nan on sample 1"),
        ({"acc": 1}, r"returned a dictionary of \['acc'\] without 'score' on sample 1"),
        ({"score": "good"}, "returned 'good', which is no number, on sample 1"),
        ([1.0], r"returned \[1.0\], which is no number, on sample 1"),
    ],
)
def test_a_result_that_is_no_score_names_its_sample(result, sentence):
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return result if solution_str == "fga" else 1.0

    with pytest.raises(RewardError, match=rf"compute_score {sentence} \(data\.jsonl:2\), completion 'fga'"):
        score((compute_score, 1.0), batch=rollout(**SAMPLES))


@pytest.mark.parametrize("is_async", [False, True])
def test_an_error_names_its_sample_and_ends_the_calls(is_async):
    asked = []

    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        asked.append(solution_str)
        raise KeyError(solution_str)

    async def later(data_source, solution_str, ground_truth, extra_info=None):
        return compute_score(data_source, solution_str, ground_truth)

    function = later if is_async else compute_score
    with pytest.raises(RewardError, match=rf"{function.__name__} raised KeyError: 'de' .* on sample 0 \(data"):
        score((function, 1.0), batch=rollout(**SAMPLES))
    assert asked == (["de", "fga"] if is_async else ["de"])
