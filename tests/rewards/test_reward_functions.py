"""Reward functions as users of TRL write them, and what they are told when one goes wrong."""

import asyncio
import gc
import math

import pytest
import torch

from meshift.batch import Batch, Ragged, column_key
from meshift.config.sections import RewardFunctionConfig
from meshift.errors import ConfigError, RewardError
from meshift.rewards.functions import (
    RewardFunctions,
    WeightedFunction,
    call_rewards,
    load_function,
    load_functions,
)

LETTERS = "abcdefgh"


def decode(ids):
    return "".join(LETTERS[i] for i in ids)


def rollout(**columns):
    """Prompts "ab" and "c", completions "de" and "fga"."""
    fields = {
        "tokens": Ragged.from_rows([[0, 1, 3, 4], [2, 5, 6, 0]]),
        "completion_lengths": Ragged.scalars([2, 3]),
    }
    return Batch(fields, {column_key(name): list(values) for name, values in columns.items()})


def call_reward(function, name, arguments):
    return call_rewards([WeightedFunction(name=name, function=function, weight=1.0)], arguments)[0]


def score(*functions, batch=None, columns=()):
    weighted = [WeightedFunction(name=f.__name__, function=f, weight=w) for f, w in functions]
    outcome = RewardFunctions(functions=weighted, decode=decode, columns=columns)(batch or rollout())
    return outcome.batch["function_scores"].values.tolist(), outcome.metrics


def test_a_function_is_given_texts_token_ids_and_every_column():
    seen = {}

    def judge(prompts, completions, completion_ids, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        return [1.0, 2.0]

    batch = rollout(answer=["x", "y"], level=[1, 2], prompt=["A B", "C"])
    assert score((judge, 1.0), batch=batch, columns=("answer", "level", "prompt"))[0] == [1.0, 2.0]
    assert seen == {
        "prompts": ["A B", "C"],  # the row's own text, not what its tokens decode to
        "completions": ["de", "fga"],
        "completion_ids": [[3, 4], [5, 6, 0]],
        "answer": ["x", "y"],
        "level": [1, 2],
    }


def test_prompts_are_decoded_where_no_column_holds_them():
    def judge(prompts, completions):
        assert prompts == ["ab", "c"]
        return [len(c) for c in completions]

    assert score((judge, 1.0))[0] == [2.0, 3.0]


def test_a_function_may_name_only_what_it_needs():
    def judge(completion_ids, answer):
        return [float(len(ids) == a) for ids, a in zip(completion_ids, answer, strict=True)]

    batch = rollout(answer=[2, 9], other=["p", "q"])
    assert score((judge, 1.0), batch=batch, columns=("answer", "other"))[0] == [1.0, 0.0]


def test_async_functions_are_awaited():
    async def judge(completions, **kwargs):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    assert score((judge, 1.0))[0] == [0.5, 0.5]


def meeting():
    """Two functions that end only if both have begun."""
    begun = []

    async def one(completions):
        begun.append("one")
        while len(begun) < 2:
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    async def two(completions):
        begun.append("two")
        while len(begun) < 2:
            await asyncio.sleep(0.001)
        return [2.0] * len(completions)

    async def waiting(completions):
        return await asyncio.wait_for(one(completions), 5)

    return waiting, two


def test_async_functions_wait_at_the_same_time():
    one, two = meeting()
    assert score((one, 1.0), (lambda completions: [7.0, 8.0], 1.0), (two, 10.0))[0] == [28.0, 29.0]


def test_async_functions_work_where_an_event_loop_already_runs():
    one, two = meeting()

    async def notebook():
        return score((one, 1.0), (two, 10.0))[0]

    assert asyncio.run(notebook()) == [21.0, 21.0]


def test_a_plain_function_may_run_an_event_loop_of_its_own_beside_async_ones():
    async def later(completions):
        return [1.0] * len(completions)

    def plain(completions):
        return asyncio.run(later(completions))

    assert score((later, 1.0), (plain, 1.0))[0] == [2.0, 2.0]


@pytest.mark.filterwarnings("error")
def test_an_async_function_beside_one_that_raises_is_named_rightly_and_leaves_no_open_coroutine():
    async def later(completions):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    def broken(completions):
        raise KeyError("gone")

    async def broken_later(completions):
        raise KeyError("gone")

    for bad in (broken, broken_later):
        with pytest.raises(RewardError, match=f"reward function {bad.__name__} raised KeyError"):
            score((later, 1.0), (bad, 1.0))
        gc.collect()


def test_prompts_of_messages_come_with_completions_of_messages_as_in_trl():
    chats = [[{"role": "user", "content": "A B"}], [{"role": "system", "content": "C"}]]

    def judge(prompts, completions):
        assert prompts == chats
        assert completions == [[{"role": "assistant", "content": text}] for text in ("de", "fga")]
        return [float(len(c[0]["content"])) for c in completions]

    assert score((judge, 1.0), batch=rollout(prompt=chats), columns=("prompt",))[0] == [2.0, 3.0]


def test_several_functions_add_up_by_weight_and_none_adds_nothing():
    def length(completions):
        return [len(c) for c in completions]

    def unsure(completions):
        return [None, 4.0]

    def silent(completions):
        return [None, None]

    scores, metrics = score((length, 0.5), (unsure, -1.0), (silent, 10.0))
    assert scores == [1.0, 1.5 - 4.0]
    assert metrics["reward/length"] == 2.5
    assert metrics["reward/unsure"] == 4.0, "a mean over what was judged"
    assert math.isnan(metrics["reward/silent"])


@pytest.mark.parametrize("result", [torch.tensor([1.0, 2.0]), (1, 2), [True, 2.0], iter([1.0, 2.0])])
def test_whatever_walks_like_a_list_of_numbers_is_taken(result):
    def judge(completions):
        return result

    assert score((judge, 1.0))[0] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, math.nan], "returned nan for sample 1"),
        ([math.inf, 1.0], "returned inf for sample 0"),
        (3.0, "returned float; return a list of numbers"),
        (None, "returned NoneType; return a list of numbers"),
        (["good", "bad"], "returned list; return a list of numbers"),
        ({"rewards": [1.0, 2.0]}, "returned dict; return a list of numbers"),
        ([[1.0, 2.0], [3.0]], "returned list; return a list of numbers"),
    ],
)
def test_anything_but_one_finite_number_each_is_refused_by_name(result, sentence):
    with pytest.raises(RewardError, match=f"reward function judge {sentence}"):
        call_reward(lambda completions: result, "judge", {"completions": ["a", "b"]})


FILE = """import json


def judge(completions, **kwargs):
    return [float(json.loads(c)) for c in completions]


async def later(completions, **kwargs):
    raise KeyError("gone")


def needs(completions, answer):
    return [0.0 for _ in completions]
"""


@pytest.fixture
def reward_file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "error", "line"), [("judge", "JSONDecodeError", 5), ("later", "KeyError", 9)])
def test_an_error_inside_a_function_names_function_file_and_line(reward_file, name, error, line):
    function = load_function(f"{reward_file}:{name}")
    with pytest.raises(RewardError) as caught:
        call_reward(function, name, {"completions": ["{"]})
    sentence = str(caught.value)
    assert sentence.startswith(f"reward function {name} raised {error}: ")
    assert sentence.endswith(f"({reward_file}, line {line})")


def test_a_column_that_the_data_lacks_is_named(reward_file):
    with pytest.raises(RewardError, match=r"needs raised TypeError.*answer"):
        call_reward(load_function(f"{reward_file}:needs"), "needs", {"completions": ["a"]})


def test_functions_come_from_files_and_modules_with_their_weights(reward_file):
    configs = [
        RewardFunctionConfig(function=f"{reward_file}:judge", weight=0.25),
        RewardFunctionConfig(function="math:fsum"),
    ]
    loaded = load_functions(configs)
    assert [(w.name, w.weight) for w in loaded] == [("judge", 0.25), ("fsum", 1.0)]
    assert loaded[0].function(["1.5"]) == [1.5]
    assert loaded[1].function is math.fsum


def test_two_files_of_one_name_are_two_modules(tmp_path):
    functions = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "rewards.py"
        path.write_text(f"NAME = {folder!r}\ndef who(completions):\n    return NAME\n", encoding="utf-8")
        functions.append(load_function(f"{path}:who"))
    assert [f([]) for f in functions] == ["one", "two"]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("judge", "write it as file.py:name or module:name"),
        ("no/such/file.py:judge", "there is no file no/such/file.py"),
        ("{file}:jugde", "has no function 'jugde'"),
        ("no_such_module_anywhere:judge", "importing no_such_module_anywhere failed with ModuleNotFoundError"),
        ("math:pi", "has no function 'pi'"),
    ],
)
def test_a_function_that_is_not_there_is_a_config_error(reward_file, spec, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load_function(spec.format(file=reward_file))


def test_a_file_that_does_not_import_says_why(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def judge(:\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken\.py failed with SyntaxError"):
        load_function(f"{path}:judge")
