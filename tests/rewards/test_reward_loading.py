"""Reward functions by name: from files, modules and servers, and what is said of those that are not there."""

import math

import pytest
from reward_batches import score_spec

from meshift.config.sections import RewardFunctionConfig
from meshift.errors import ConfigError
from meshift.rewards.configured import check_columns, describe_functions, load_functions
from meshift.rewards.loading import load_function

FILE = """import json


def judge(completions, **kwargs):
    return [float(json.loads(c)) for c in completions]


def short(completions, scale=1.0):
    return [scale for c in completions]


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0


def scores_of(data_sources, solution_strs, ground_truths, extra_infos, bonus):
    return [bonus] * len(solution_strs)


def reward_func(queries, prompts, labels):
    return [0.0] * len(queries)


def total(numbers, start):
    return 0.0


class Judge:
    def __call__(self, completions):
        return [1.0 for _ in completions]


grader = Judge()
scale = 3
"""


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def load(*specs, **keys):
    return load_functions([RewardFunctionConfig(function=str(spec), **keys) for spec in specs])


def test_functions_come_from_files_and_modules_with_their_keys(reward_file, tmp_path, monkeypatch):
    (tmp_path / "pack_of_rewards").mkdir()
    (tmp_path / "pack_of_rewards" / "rules.py").write_text("from my_rewards import short as rule\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(reward_file.parent)
    (judge,) = load(f"{reward_file}:judge", weight=0.25, timeout_s=3.0, on_error="skip")
    assert (judge.name, judge.weight, judge.timeout_s, judge.on_error) == ("judge", 0.25, 3.0, "skip")
    assert judge.function(["1.5"]) == [1.5]
    (rule,) = load("pack_of_rewards.rules:rule", kwargs={"scale": 2.0})
    assert (rule.name, rule.weight, rule.timeout_s, rule.on_error) == ("rule", 1.0, None, "stop")
    assert rule.function(["x"], **rule.kwargs) == [2.0]


def test_flavours_are_told_by_parameter_names(reward_file):
    names = ("judge", "compute_score", "scores_of", "reward_func", "grader")
    specs = [f"{reward_file}:{name}" for name in names]
    loaded = load(*specs[:2]) + load(specs[2], kwargs={"bonus": 1.0}) + load(*specs[3:], weight=-0.5)
    assert describe_functions([*loaded, *load("http://127.0.0.1:5000/get_reward")]) == (
        "1 x judge (TRL) + 1 x compute_score (verl) + 1 x scores_of (verl batch) + -0.5 x reward_func (OpenRLHF) "
        "+ -0.5 x grader (TRL) + 1 x get_reward (OpenRLHF)"
    )


def test_functions_of_one_name_have_metrics_of_their_own(reward_file):
    names = [f.name for f in load(f"{reward_file}:judge", "http://a:1/get_reward", "http://b:1/get_reward")]
    assert names == ["judge", "http://a:1/get_reward", "http://b:1/get_reward"]


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
        ("mathss", r"no reward function .mathss.; did you mean .maths.\? Write one of yours as file.py:name"),
        ("qqqq", "those of Meshift.s own are unit_tests, maths, "),
        ("no/such/file.py:judge", "there is no file no/such/file.py"),
        ("{folder}/my_reward.py:judge", r"my_reward\.py; did you mean 'my_rewards\.py'\?"),
        ("{folder}/my_rewards.py:jugde", r"has no function 'jugde'; did you mean 'judge'\?"),
        ("{folder}/my_rewards.py:qqqqq", r"has no function 'qqqqq' \(reward\.functions names"),
        ("{folder}/my_rewards.py:scale", "'scale' in .* is of type int; name a function"),
        ("{folder}/my_rewards.py:Judge", "'Judge' in .* is a class; name a function"),
        ("{folder}/my_rewards.py:total", r"total has none of the parameter lists .*TRL prompts, completions"),
        ("no_such_module_anywhere:judge", "importing no_such_module_anywhere failed with ModuleNotFoundError"),
        ("math:fsum", "fsum has none of the parameter lists"),
        ("math:pi", "'pi' in math is of type float"),
        ("ftp://host/get_reward", "only http and https are asked, not ftp"),
        ("http://host:port/get_reward", "no valid address"),
        ("http:///get_reward", "names no host"),
        ("http://me:secret@host/get_reward", r"http://host/get_reward: a user name .* remove it"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_in_one_sentence(reward_file, spec, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(spec.format(folder=reward_file.parent))


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def judge(:\n", r"broken\.py failed with SyntaxError"),
        ("import sys\nsys.exit('usage')\n", r"broken\.py failed with SystemExit: usage"),
        ("1 / 0\n", r"broken\.py failed with ZeroDivisionError"),
    ],
)
def test_a_file_that_does_not_import_says_why(tmp_path, code, sentence):
    path = tmp_path / "broken.py"
    path.write_text(code, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        load(f"{path}:judge")


@pytest.mark.parametrize(
    ("name", "kwargs", "sentence"),
    [
        ("short", {"scales": 2}, r"short takes no parameter 'scales'.*the run gives: scale\)"),
        ("short", {"completions": []}, "short is given 'completions' by the run"),
        ("compute_score", {"bonus": 2}, r"compute_score takes no parameter 'bonus'.*: none\)"),
        ("reward_func", {"labels": 2}, "reward_func is given 'labels' by the run"),
    ],
)
def test_kwargs_that_the_function_cannot_take_are_refused(reward_file, name, kwargs, sentence):
    with pytest.raises(ConfigError, match=sentence):
        load(f"{reward_file}:{name}", kwargs=kwargs)


def test_kwargs_for_a_server_are_refused():
    with pytest.raises(ConfigError, match="get_reward takes no parameter 'key'"):
        load("http://127.0.0.1:5000/get_reward", kwargs={"key": 1})


@pytest.mark.parametrize("columns", [("answer",), ("ground_truth",), ("label",), ("reward_model",)])
def test_a_ground_truth_may_stand_under_several_names(reward_file, columns):
    check_columns(load(f"{reward_file}:compute_score"), ("prompt", *columns))


@pytest.mark.parametrize(
    ("name", "keys", "columns", "sentence"),
    [
        (
            "compute_score",
            {},
            ("prompt", "data_source"),
            r"needs 'ground_truth', .*columns reward_model, .*data_source",
        ),
        ("scores_of", {"kwargs": {"bonus": 1.0}}, ("prompt",), "needs 'ground_truths', but the data has none"),
        ("scores_of", {}, ("answer",), "needs 'bonus', which verl batch functions are not given"),
        ("judge", {"kwargs": {"answer": 1}}, ("answer",), "'answer' is among its kwargs and a column"),
    ],
)
def test_what_the_data_cannot_give_is_named(reward_file, name, keys, columns, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_columns(load(f"{reward_file}:{name}", **keys), columns)


def test_openrlhf_functions_need_no_labels(reward_file):
    check_columns(load(f"{reward_file}:reward_func"), ("prompt",))


def test_loading_brings_no_torch_to_a_functions_own_process():
    import subprocess
    import sys

    code = "import sys, meshift.rewards.worker_process; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_limit_of_nothing_is_no_limit():
    for value in (0, -1.0, math.inf):
        with pytest.raises(ValueError, match="timeout_s"):
            RewardFunctionConfig(function="a:b", timeout_s=value)


@pytest.mark.parametrize("timeout_s", [None, 120.0])
def test_a_file_that_imports_its_neighbour_would_need_a_package(tmp_path, timeout_s):
    (tmp_path / "lengths_beside.py").write_text("SCALE = 3.0\n")
    path = tmp_path / "split_reward.py"
    path.write_text(
        "from lengths_beside import SCALE\n\n\n"
        "def judge(completions):\n    import lengths_beside as beside\n\n"
        "    return [beside.SCALE * SCALE] * len(completions)\n"
    )
    assert score_spec(f"{path}:judge", timeout_s=timeout_s)[0] == [9.0, 9.0]


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_function_that_bears_the_name_of_a_total_would_lose_its_own_metric(tmp_path, name):
    path = tmp_path / "odd.py"
    path.write_text(f"def {name}(completions):\n    return [7.0] * len(completions)\n")
    _, metrics = score_spec(f"{path}:{name}")
    assert metrics == {f"reward/{path}:{name}": 7.0}
