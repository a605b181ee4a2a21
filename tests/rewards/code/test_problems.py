"""Rows of the data sets as they are, and problems that cannot be read."""

import json

import pytest

from meshift.rewards.code.problems import Problem, ProblemError, form_of, read_problem

# The columns of each are those of the published data sets; the contents are our own.
CODE_CONTESTS = {
    "name": "1_A. Sum",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["2 2\n"], "output": ["4\n"]},
    "generated_tests": {"input": [], "output": []},
    "time_limit": {"seconds": 1, "nanos": 500000000},
    "memory_limit_bytes": 256000000,
    "solutions": {"language": [3], "solution": ["print(sum(map(int, input().split())))"]},
}
APPS_STDIN = {
    "problem_id": 1,
    "input_output": json.dumps({"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}),
    "difficulty": "introductory",
    "starter_code": "",
}
APPS_CALL = {
    "input_output": json.dumps({"fn_name": "count", "inputs": [[{"1": 2}, "a"]], "outputs": [[{"3": [4]}]]}),
    "starter_code": "class Solution:\n    def count(self, table, letter):\n        ",
}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
    "entry_point": "successor",
    "canonical_solution": "    return x + 1\n",
}
HEAD = 'def successor(x):\n    """The next."""\n'
MBPP = {
    "task_id": 11,
    "code": "class Node:\n    pass\ndef sum(a, b):\n    return a + b",
    "test_list": ["assert sum(1, 2) == 3", "assert sum(2, 2) == 4"],
    "test_setup_code": "import math",
    "challenge_test_list": [],
}


def test_code_contests():
    problem = read_problem(CODE_CONTESTS, "Add them.")
    assert problem == Problem(
        inputs=[("1 2\n", "3\n"), ("2 2\n", "4\n")],
        contest=True,
        time_limit_s=1.5,
        memory_limit_bytes=256000000,
    )
    assert read_problem(CODE_CONTESTS, "", max_tests=1).inputs == [("1 2\n", "3\n")]
    assert read_problem(CODE_CONTESTS | {"time_limit": None, "private_tests": None}, "").time_limit_s is None
    pairs = [{"input": "1 2\n", "output": "3\n"}]
    assert len(read_problem(CODE_CONTESTS | {"public_tests": pairs}, "")) == 2


def test_apps():
    assert read_problem(APPS_STDIN, "").inputs == [("1 2\n", "3\n"), ("3\n4", "7")]
    [test] = read_problem(APPS_CALL, "").tests
    assert test == {"call": "count", "method_of": "Solution", "given": [{1: 2}, "a"], "expected": [{3: [4]}]}


def test_human_eval():
    problem = read_problem(HUMAN_EVAL, HEAD)
    assert (problem.opening, problem.setup, problem.entry_point, problem.remote) == (
        HEAD,
        HEAD,
        "successor",
        ["successor"],
    )
    assert problem.tests == [{"code": HUMAN_EVAL["test"] + "\ncheck(successor)"}]
    chat = [{"role": "user", "content": "Write successor."}]
    assert read_problem(HUMAN_EVAL, chat).opening == ""
    assert read_problem(HUMAN_EVAL | {"opening": HEAD}, chat).opening == HEAD


def test_mbpp():
    problem = read_problem(MBPP, "Write a function.")
    assert problem.tests == [{"code": "assert sum(1, 2) == 3"}, {"code": "assert sum(2, 2) == 4"}]
    assert (problem.setup, problem.remote) == ("import math", ["Node", "sum"])
    sanitized = {"test_list": ["assert f(1)"], "test_imports": ["import math", "import re"], "source_file": "x"}
    assert read_problem(sanitized, "").setup == "import math\nimport re"


def test_plain_tests_and_rows_of_verl():
    assert read_problem({"tests": ["assert f(1) == 1"]}, "").tests == [{"code": "assert f(1) == 1"}]
    assert read_problem({"tests": [{"input": "1", "output": 2}]}, "").inputs == [("1", "2")]
    truth = json.dumps({"inputs": ["1"], "outputs": ["2"]})
    assert read_problem({"ground_truth": truth}, "").inputs == [("1", "2")]
    assert read_problem({"reward_model": {"ground_truth": truth}}, "").inputs == [("1", "2")]


def test_a_problem_without_tests_is_empty_and_no_error():
    for empty in ("", "{}", json.dumps({"inputs": [], "outputs": []})):
        assert len(read_problem({"input_output": empty}, "")) == 0
    for row in ({"tests": None}, {"input_output": None, "other": 1}):
        assert len(read_problem(row, "")) == 0


@pytest.mark.parametrize(
    "row",
    [
        {"input_output": "{not json"},
        {"input_output": json.dumps({"inputs": ["1"], "outputs": []})},
        {"public_tests": {"input": ["1"], "output": []}},
        {"reward_model": {}},
        {"tests": [{"input": "1"}]},
        {"tests": 3},
        {"answer": "3"},
        {},
    ],
)
def test_a_row_that_cannot_be_read_is_an_error_that_says_so(row):
    with pytest.raises(ProblemError, match=r"cannot be read|in none of the known columns"):
        read_problem(row, "")


def test_the_form_is_told_by_the_columns():
    assert form_of(["prompt", "private_tests"]) == "CodeContests"
    assert form_of(["test", "entry_point"]) == "HumanEval"
    assert form_of(["test"]) is None
