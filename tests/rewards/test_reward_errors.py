"""A reward function that fails: the sample is named, and the run stops or goes on, as its config says."""

import logging
import math

import pytest
from reward_batches import host_call, rollout, score, untimed

from meshift.errors import RewardError
from meshift.rewards.functions import WeightedFunction
from meshift.rewards.sandbox.slot import SandboxError

BATCH = {"prompts": ["a", "b", "c", "d"], "completions": ["ab", "fg", "cd", "fe"]}


def skipping(function, batch=None, **keys):
    batch = rollout(**BATCH) if batch is None else batch
    weighted = WeightedFunction(name=function.__name__, function=function, weight=1.0, on_error="skip", **keys)
    outcome = host_call([weighted], batch)(batch)
    return outcome.batch["function_scores"].values.nan_to_num(0.0).tolist(), untimed(outcome.metrics)


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ([1.0], "returned 1 values for 2 completions on a batch of 2 samples"),
        ([1.0] * 3, "returned 3 values for 1 completions on sample 0"),
        ([1.0, math.nan], r"returned nan on sample 1 \(data.jsonl:2\), completion 'fga'"),
        ([math.inf, 1.0], r"returned inf on sample 0 \(data.jsonl:1\), completion 'de'"),
        ([1.0, 1e39], "returned 1e.39 on sample 1"),
        ([1.0, 10**400], "returned 1000.*, which is no number, on sample 1"),
        (3.0, "returned float instead of a list of numbers"),
        (None, "returned NoneType instead of a list of numbers"),
        ("good", "returned str instead of a list of numbers"),
        (["good", 1.0], "returned 'good', which is no number, on sample 0"),
        ({"rewards": [1.0, 2.0]}, "returned dict instead of a list of numbers"),
        ([[1.0, 2.0], 3.0], r"returned \[1.0, 2.0\], which is no number, on sample 0"),
        ([1.0, 1j], "returned 1j, which is no number, on sample 1"),
    ],
)
def test_anything_but_one_finite_number_each_is_refused_by_name(result, sentence):
    def judge(completions):
        return result

    with pytest.raises(RewardError, match=f"reward function judge {sentence}"):
        score((judge, 1.0))


FILE = """import json


def judge(completions, **kwargs):
    return [float(json.loads(c)) for c in completions]


async def later(completions, **kwargs):
    raise KeyError("gone")


def walked(completions, **kwargs):
    for c in completions:
        yield 1 / 0


def ended(completions, **kwargs):
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("name", "error", "line"),
    [
        ("judge", "JSONDecodeError", 5),
        ("later", "KeyError", 9),
        ("walked", "ZeroDivisionError", 14),
        ("ended", "", 18),
    ],
)
def test_an_error_inside_a_function_names_function_file_line_and_sample(tmp_path, name, error, line):
    from reward_batches import score_spec

    path = tmp_path / "my_rewards.py"
    path.write_text(FILE, encoding="utf-8")
    with pytest.raises(RewardError) as caught:
        score_spec(f"{path}:{name}")
    sentence = str(caught.value)
    assert sentence.startswith(f"reward function {name} raised {error or 'SystemExit'}: ")
    assert f"({path}, line {line}) on sample 0 (data.jsonl:1), completion 'de'; " in sentence
    assert sentence.endswith("set its on_error: skip")


def test_a_long_completion_is_quoted_in_part_and_a_long_error_too():
    def judge(completions):
        raise ValueError("so much\n to say " * 1000)

    with pytest.raises(RewardError) as caught:
        score((judge, 1.0), batch=rollout(prompts=["a"], completions=["b" * 500], where=False))
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)
    assert f"on sample 0, completion '{'b' * 60}...'" in str(caught.value)


def test_a_batch_that_fails_names_the_sample_that_fails_alone():
    def judge(completions):
        return [{"ab": 1.0, "cd": 2.0, "fe": 3.0}[text] for text in completions]

    with pytest.raises(
        RewardError, match=r"raised KeyError: 'fg' .* on sample 1 \(data.jsonl:2\), completion 'fg'"
    ):
        score((judge, 1.0), batch=rollout(**BATCH))


def test_samples_that_are_skipped_get_nothing_and_are_counted():
    def judge(completions):
        assert not any(text.startswith("f") for text in completions), "f"
        return [float(len(completions))] * len(completions)

    scores, metrics = skipping(judge)
    assert scores == [2.0, 0.0, 2.0, 0.0], "the values come from one call on the two that can be scored"
    assert metrics == {"reward/judge": 2.0, "reward/judge/num_errors": 2, "reward/judge/num_timeouts": 0}


def test_a_function_that_forgets_samples_is_located_too():
    def judge(completions):
        return [1.0 for text in completions if "f" not in text]

    assert skipping(judge)[0] == [1.0, 0.0, 1.0, 0.0]
    with pytest.raises(RewardError, match="returned 0 values for 1 completions on sample 1"):
        score((judge, 1.0), batch=rollout(**BATCH))


def test_numbers_that_are_none_are_skipped_without_another_call():
    calls = []

    def judge(completions):
        calls.append(completions)
        return [1.0, math.nan, 3.0, None]

    scores, metrics = skipping(judge)
    assert scores == [1.0, 0.0, 3.0, 0.0]
    assert len(calls) == 1
    assert metrics == {"reward/judge": 2.0, "reward/judge/num_errors": 1, "reward/judge/num_timeouts": 0}


@pytest.mark.parametrize("alone", ["works", "fails otherwise"])
def test_where_no_sample_is_to_blame_the_batch_is_named(alone):
    def judge(completions):
        if len(completions) > 1:
            raise ZeroDivisionError("all alike")
        assert alone == "works", "too few to compare"
        return [1.0]

    with pytest.raises(RewardError, match=r"judge raised ZeroDivisionError: all alike .* on a batch of 4 samples"):
        score((judge, 1.0), batch=rollout(**BATCH))
    scores, metrics = skipping(judge)
    assert scores == [0.0] * 4
    assert metrics["reward/judge/num_errors"] == 4
    assert "reward/judge" not in metrics


def test_a_function_that_fails_again_without_the_culprits_is_skipped_for_all():
    calls = []

    def judge(completions):
        calls.append(len(completions))
        assert "fg" not in completions
        assert len(calls) < 6
        return [1.0] * len(completions)

    scores, metrics = skipping(judge)
    assert (scores, metrics["reward/judge/num_errors"]) == ([0.0] * 4, 4)
    assert calls == [4, 1, 1, 1, 1, 3]


def test_what_is_skipped_is_said_once_and_other_functions_count(caplog):
    def judge(completions):
        raise KeyError("gone")

    def other(completions):
        return [float(len(text)) for text in completions]

    functions = [
        WeightedFunction(name="judge", function=judge, weight=1.0, on_error="skip"),
        WeightedFunction(name="other", function=other, weight=2.0),
    ]
    call = host_call(functions, rollout())
    with caplog.at_level(logging.WARNING, logger="meshift"):
        outcomes = [call(rollout()) for _ in range(3)]
    assert [o.batch["function_scores"].values.tolist() for o in outcomes] == [[4.0, 6.0]] * 3
    assert [o.metrics["reward/judge/num_errors"] for o in outcomes] == [2] * 3
    (record,) = caplog.records
    assert "judge raised KeyError: 'gone'" in record.getMessage()
    assert "get no reward from it" in record.getMessage()


def test_a_sample_that_no_function_gives_a_number_has_no_score_rather_than_zero():
    def some(completions):
        return [1.0, None, None, 0.0]

    def others(completions):
        return [1.0, None, 2.0, None]

    weighted = [WeightedFunction(name=f.__name__, function=f, weight=1.0) for f in (some, others)]
    batch = rollout(**BATCH)
    scores = host_call(weighted, batch)(batch).batch["function_scores"].values.tolist()
    assert [scores[i] for i in (0, 2, 3)] == [2.0, 2.0, 0.0]
    assert math.isnan(scores[1])


def test_a_function_that_stops_counts_nothing():
    def judge(completions):
        return [1.0, 2.0]

    assert score((judge, 1.0))[1] == {"reward/judge": 1.5}


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_a_broken_sandbox_would_be_a_completion_without_a_score(on_error, waits):
    calls = []

    def judge(completions, **kwargs):
        calls.append(len(completions))
        raise SandboxError("the sandbox cannot be put up")

    judge.waits = waits
    weighted = WeightedFunction(name="judge", function=judge, weight=1.0, on_error=on_error)
    with pytest.raises(SandboxError, match="cannot be put up"):
        host_call([weighted], rollout())(rollout())
    assert calls == [2], "it would be called again for each sample"
