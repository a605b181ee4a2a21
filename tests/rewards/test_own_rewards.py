"""Meshift's own reward functions: right and wrong answers, forms, lengths; what stops them."""

import importlib.util
import time

import pytest
import reward_batches
from reward_batches import LETTERS, rollout, score_spec

from meshift.config.reward_kwargs import LengthConfig
from meshift.config.sections import RewardFunctionConfig
from meshift.errors import ConfigError, RewardError
from meshift.rewards import answers as rewards_of_answers
from meshift.rewards.configured import check_columns, load_functions
from meshift.rewards.loading import load_function
from meshift.rewards.shapes import Length, matches
from meshift.rewards.signatures import read_signature

GOOD = "<think>two and two</think>\n<answer>4</answer>"


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (GOOD, 1.0),
        ("so: " + GOOD, 0.0),
        (GOOD + " or 5", 0.0),
        (GOOD + GOOD, 0.0),
        ("<think>a<think>b</think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4</answer></answer>", 0.0),
        ("<answer>4</answer>", 0.0),
    ],
)
def test_the_default_format_is_a_thought_then_an_answer_each_once(text, reward):
    assert matches(text) == reward


def test_formats_match_the_whole_a_part_or_are_counted():
    assert [matches("a1b2c3", r"\d", how) for how in ("whole", "anywhere")] == [0.0, 1.0]
    assert [matches("a1b2c3", r"\d", "count", most) for most in (1, 2, 6)] == [1.0, 1.0, 0.5]
    assert matches("a\nb", "a.b") == 1.0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"most": 4}, {0: 0, 4: 0, 5: -1, 9: -1}),
        ({"most": 4, "buffer": 2}, {4: 0, 5: -0.5, 6: -1, 9: -1}),
        ({"least": 4}, {0: -1, 1: -0.75, 4: 0, 99: 0}),
        ({"least": 2, "most": 2, "buffer": 4}, {1: -0.5, 2: 0, 3: -0.25}),
    ],
)
def test_length_costs_what_its_corners_say(keys, expected):
    function = Length(LengthConfig(**keys))
    lengths = list(expected)
    assert function(["x"] * len(lengths), [[0] * n for n in lengths]) == pytest.approx(list(expected.values()))


def test_length_counts_tokens_words_or_characters_of_texts_and_messages():
    for unit, cost in (("tokens", -0.5), ("words", 0.0), ("characters", -1.0)):
        function = Length(LengthConfig(unit=unit, most=2, buffer=2))
        said = ["ab cd", [{"role": "assistant", "content": "ab cd"}]]
        assert function(said, [[1, 2, 3]] * 2) == [cost, cost]


def test_own_functions_are_weighted_beside_each_other_in_a_run():
    batch = rollout(prompts=["a", "b"], completions=["deh", "f"])
    scores, metrics = score_spec("format", batch, kwargs={"pattern": "d.*"}, weight=2.0)
    assert (scores, metrics) == ([2.0, 0.0], {"reward/format": 0.5})
    assert score_spec("length", batch, kwargs={"most": 1, "buffer": 4})[0] == [-0.5, 0.0]


def test_a_regular_expression_that_takes_for_ever_is_stopped_and_its_sample_named():
    """In the run's own process it would hold the interpreter, and with it every thread."""
    batch = rollout(completions=["de", "a" * 40 + "b"])
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"format gave no answer within timeout_s = 0\.5 on sample 1 \(data.jsonl:2"
    ):
        score_spec("format", batch, kwargs={"pattern": "(a+)+c|de"}, timeout_s=0.5)
    assert time.monotonic() - started < 60
    scores, metrics = score_spec("format", batch, kwargs={"pattern": "(a+)+c|de"}, timeout_s=0.5, on_error="skip")
    assert (scores, metrics["reward/format/num_timeouts"]) == ([1.0, 0.0], 1)


@pytest.mark.parametrize(
    ("name", "kwargs", "keys", "sentence"),
    [
        ("format", {"pattern": "(a"}, {}, "format.*no regular expression"),
        ("format", {"patern": "a"}, {}, "unknown key `patern`"),
        ("length", {}, {}, "no length costs anything; set one.*length"),
        ("length", {"least": 5, "most": 4}, {}, "most = 4 is below least = 5"),
        ("length", {"most": 4}, {"timeout_s": 3}, "length has its own time limits"),
        ("judge", {"url": "ftp://x/v1", "model": "m"}, {}, "the judge's server .* only http and https"),
        (
            "judge",
            {"url": "http://x/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"},
            {},
            "NO_SUCH_KEY.*export it",
        ),
        ("judge", {"url": "http://x/v1", "model": "m", "question": "Well?"}, {}, r"never shows .* \{completion\}"),
    ],
)
def test_wrong_keys_are_named_before_a_run(name, kwargs, keys, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_functions([RewardFunctionConfig(function=name, kwargs=kwargs, **keys)])


@pytest.mark.parametrize(("name", "extra"), [("maths", "math"), ("reasoning_gym", "reasoning")])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ConfigError, match=rf"pip install 'meshift\[{extra}\]'"):
        load_functions([RewardFunctionConfig(function=name)])


@pytest.fixture
def maths():
    pytest.importorskip("math_verify")
    from meshift.rewards.maths import maths

    return maths


@pytest.mark.parametrize(
    ("answer", "truth", "reward"),
    [
        ("So it is \\boxed{\\frac{1}{2}}.", "0.5", 1.0),
        ("It is $x + 1$.", "1+x", 1.0),
        ("It is $x + 2$.", "1+x", 0.0),
        ("The answer is 1,234", 1234, 1.0),
        ("She makes $18 a day.", "16 - 3 - 4 = 9 eggs\n#### 18", 1.0),
        ("She makes 19.", "16 - 3 - 4 = 9 eggs\n#### 18", 0.0),
        ("<think>\\boxed{1}</think> \\boxed{2}", "2", 1.0),
        ("<think>\\boxed{2}</think> \\boxed{1}", "2", 0.0),
        ("\\boxed{(1, 2)}", "(1,2)", 1.0),
        ("\\boxed{(2, 1)}", "(1,2)", 0.0),
        ("It is \\boxed{1} or \\boxed{2}", "2", 0.0),
        ("I do not know.", "2", 0.0),
        ("", "2", 0.0),
    ],
)
def test_answers_are_compared_as_mathematics(maths, answer, truth, reward):
    assert maths(answer, truth) == reward


def test_only_a_box_counts_where_that_is_asked(maths):
    assert [maths(text, "2", boxed_only=True) for text in ("2", "\\boxed{2}", "\\boxed{2} and 3")] == [
        0.0,
        1.0,
        1.0,
    ]


def test_a_truth_that_is_none_names_its_sample():
    pytest.importorskip("math_verify")
    batch = rollout(prompts=["a", "b"], completions=["de", "f"], answer=["2", ""])
    with pytest.raises(
        RewardError, match=r"maths raised ValueError: the right answer '' .* sample 1 \(data.jsonl:2"
    ):
        score_spec("maths", batch, timeout_s=60)


def test_maths_without_a_column_of_answers_is_refused_before_a_run():
    pytest.importorskip("math_verify")
    with pytest.raises(ConfigError, match="maths needs 'ground_truth', but the data has none of the columns"):
        check_columns(load_functions([RewardFunctionConfig(function="maths")]), ["prompt"])


HANGING = ("\\boxed{9^{9^{9^{9}}}}", "\\boxed{10000000000!}", "\\boxed{\\sum_{n=1}^{10^9}\\sin n}")


def answered(monkeypatch, answers, truths, **keys):
    """`maths` on these completions: their scores, and the metrics."""
    monkeypatch.setattr(reward_batches, "decode", lambda ids: answers[ids[-1]])
    letters = LETTERS[: len(answers)]
    batch = rollout(prompts=["a"] * len(answers), completions=list(letters), answer=truths)
    return score_spec("maths", batch, **keys)


def test_an_answer_that_hangs_symbolic_algebra_is_wrong_and_stops_neither_the_run_nor_later_answers(monkeypatch):
    """More of them than the timeouts that other functions may have in a step; on_error is its default, stop."""
    pytest.importorskip("math_verify")
    answers = ["\\boxed{3}", *HANGING * 2, "\\boxed{3}"]
    started = time.monotonic()
    scores, metrics = answered(monkeypatch, answers, ["3"] * 8, timeout_s=0.5)
    assert scores == [1.0, *[0.0] * 6, 1.0]
    assert metrics == {"reward/maths": 2 / 8, "reward/maths/stopped": 6 / 8}
    assert time.monotonic() - started < 60


def test_the_default_limit_of_an_answer_is_short():
    pytest.importorskip("math_verify")
    [function] = load_functions([RewardFunctionConfig(function="maths")])
    assert (function.timeout_s, function.on_error) == (3.0, "stop")


@pytest.mark.parametrize("truth", [HANGING[0], ""])
def test_only_a_right_answer_that_cannot_be_compared_stops_a_run(monkeypatch, truth):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(rewards_of_answers, "TRUTH_S", 1.0)
    with pytest.raises(RewardError, match=r"^reward function maths (gave no|raised V).* sample 1 \(data.jsonl:2"):
        answered(monkeypatch, ["\\boxed{3}", "\\boxed{4}"], ["3", truth], timeout_s=1.0)


def test_a_completion_that_ends_the_process_or_raises_is_wrong(tmp_path):
    (tmp_path / "checker.py").write_text(
        "import os\n\ndef check(solution_str, ground_truth):\n    if solution_str == 'end': os._exit(3)\n"
        "    return float(solution_str) == float(ground_truth)\n"
    )
    spec = f"{tmp_path}/checker.py:check"
    function = load_function(spec)
    invoke = rewards_of_answers.AnswerInvoker(spec, read_signature(function), 30.0, "1")
    calls = [{"solution_str": text, "ground_truth": "2"} for text in ("2", "end", "two", "1", "2")]
    scores = invoke(calls, 5)
    assert (scores.values, scores.faults) == ([1.0, 0.0, 0.0, 0.0, 1.0], {})
    assert {i: fault.kind for i, fault in scores.excused.items()} == {1: "exit", 2: "ValueError"}
    scores = invoke([{"solution_str": "2", "ground_truth": "?"}, *calls], 6)
    assert (scores.values[0], list(scores.faults), list(scores.excused)) == (None, [0], [2, 3])


def test_tasks_of_reasoning_gym_are_rows_that_their_own_scorers_score():
    gym = pytest.importorskip("reasoning_gym")
    from meshift.data.dataset import dataset_rows
    from meshift.rewards.reasoning import reasoning_gym

    for name in ("chain_sum", "leg_counting", "countdown", "family_relationships", "simple_equations"):
        rows = [row.values for row in dataset_rows(f"reasoning-gym:{name}?size=6&seed=3[:4]")]
        made = gym.create_dataset(name, size=6, seed=3)
        assert [row["prompt"] for row in rows] == [made[i]["question"] for i in range(4)]
        told = [row["reasoning_gym"] for row in rows]
        right = [f"<think>well</think> <answer>{made[i]['answer']}</answer>" for i in range(4)]
        assert reasoning_gym(right, told) == [1.0] * 4
        assert all(score < 1 for score in reasoning_gym(["<answer>nonsense</answer>"] * 4, told))


def test_an_answer_that_a_scorer_of_reasoning_gym_raises_for_is_wrong_and_a_broken_scorer_is_none(monkeypatch):
    gym = pytest.importorskip("reasoning_gym")
    from meshift.data.dataset import dataset_rows
    from meshift.rewards.reasoning import reasoning_gym

    [row] = dataset_rows("reasoning-gym:prime_factorization?size=1&seed=3")
    told = row.values["reasoning_gym"]
    tasks = gym.create_dataset("prime_factorization", size=1, seed=3)
    with pytest.raises(ValueError):  # else this test would show nothing
        tasks.score_answer("I do not know", tasks[0])
    assert reasoning_gym(["I do not know", f"<answer>{tasks[0]['answer']}</answer>"], [told] * 2) == [0.0, 1.0]
    monkeypatch.setattr(type(tasks), "score_answer", lambda self, answer, entry: {}["its table"])
    with pytest.raises(KeyError, match="its table"):
        reasoning_gym(["2"], [told])


def test_a_task_that_is_another_one_here_is_refused():
    pytest.importorskip("reasoning_gym")
    from meshift.data.dataset import dataset_rows
    from meshift.rewards.reasoning import reasoning_gym

    [row] = dataset_rows("reasoning-gym:chain_sum?size=1")
    told = {**row.values["reasoning_gym"], "question": "What is 1 + 1?"}
    with pytest.raises(ValueError, match="another one here"):
        reasoning_gym(["2"], [told])
