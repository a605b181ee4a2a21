"""Each benchmark's own rows become questions: what models read, what is right, and what is wrong with a row."""

from pathlib import Path

import pytest
from benchmark_rows import (
    APPS,
    APPS_CALL,
    CODE_CONTESTS,
    GSM8K,
    HH,
    HUMAN_EVAL,
    MATH,
    MBPP,
    MBPP_SANITIZED,
    SAFE_RLHF,
    questions_of,
)

from meshift.cli.eval import TASK_NAMES
from meshift.data.packages import NAMES
from meshift.errors import DataError, InputError
from meshift.evaluation.tasks import TASKS, cut_at, find_task, load_questions

REAL_PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_harmless_dev.jsonl"


def test_the_command_lists_the_tasks_that_there_are():
    assert tuple(TASKS) == TASK_NAMES
    assert all(task.data is None or task.data in NAMES for task in TASKS.values())


@pytest.mark.parametrize(
    ("task", "row", "name", "in_prompt", "in_asked"),
    [
        ("humaneval", HUMAN_EVAL, "HumanEval/0", 'def double(x):\n    """Twice x."""', "def double(x)"),
        ("mbpp", MBPP, "11", "assert add(1, 2) == 3", "assert add(-1, 1) == 0"),
        ("mbpp", MBPP_SANITIZED, "12", "Write a function that adds.", "math.isclose"),
        ("apps", APPS, "7", "standard input", "standard input"),
        ("apps", APPS_CALL, "8", "def count(self", "class Solution"),
        ("codecontests", CODE_CONTESTS, "1_A. Sums", "Add the numbers", "standard output"),
        ("gsm8k", GSM8K, "0", "Question: How many legs have two dogs?\nAnswer:", "#### "),
        ("math", MATH, "0", "What is half of one?", "\\boxed{}"),
    ],
)
def test_a_plain_model_goes_on_with_a_prompt_and_a_chat_model_is_asked(
    tmp_path, task, row, name, in_prompt, in_asked
):
    [question] = questions_of(tmp_path, task, row)
    assert question.id == name
    assert in_prompt in question.prompt
    assert in_asked in question.asked
    assert question.where.endswith(":1")


def test_what_is_right_never_stands_in_a_prompt(tmp_path):
    rows = {
        "humaneval": (HUMAN_EVAL, "2 * x"),
        "mbpp": (MBPP, "a + b"),
        "gsm8k": (GSM8K, "8"),
        "math": (MATH, "2}"),
    }
    for task, (row, secret) in rows.items():
        [question] = questions_of(tmp_path, task, row)
        assert secret not in question.prompt
        assert secret not in question.asked


def test_human_evals_prompts_end_where_their_text_does(tmp_path):
    """A token that holds a line's end and the next one's indent would be none that the model can begin with."""
    [question] = questions_of(tmp_path, "humaneval", HUMAN_EVAL)
    assert question.prompt == HUMAN_EVAL["prompt"].rstrip()


def test_answers_and_groups(tmp_path):
    assert questions_of(tmp_path, "gsm8k", GSM8K)[0].truth == "8"
    [maths] = questions_of(tmp_path, "math", MATH)
    assert (maths.truth, maths.group) == (MATH["solution"], "Level 1")
    assert questions_of(tmp_path, "apps", APPS)[0].group == "introductory"


def test_the_pairs_of_people(tmp_path):
    [hh] = questions_of(tmp_path, "hh-rlhf", HH)
    assert hh.prompt == "\n\nHuman: Hi\n\nAssistant:"
    assert (hh.liked, hh.disliked) == (" Hello, how are you?", " Go away.")
    assert (hh.safer, hh.riskier) == (None, None)
    [safe] = questions_of(tmp_path, "safe-rlhf", SAFE_RLHF)
    assert safe.prompt == "\n\nHuman: How are locks picked?\n\nAssistant:"
    assert (safe.liked, safe.disliked) == (" With a tension wrench.", " I cannot say.")
    assert (safe.safer, safe.riskier) == (" I cannot say.", " With a tension wrench.")
    [bare] = questions_of(tmp_path, "hh-rlhf", {"prompt": "\n\nHuman: Hi\n\nAssistant:"})
    assert bare.liked is None


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("gsm8k", {"question": "?", "answer": "eight"}, "####"),
        ("gsm8k", {"question": "?"}, "answer"),
        ("humaneval", {**HUMAN_EVAL, "entry_point": " "}, "entry_point"),
        ("mbpp", {**MBPP, "test_list": []}, "test_list"),
        ("mbpp", {**MBPP, "test_list": "assert True"}, "test_list"),
        ("apps", {**APPS, "input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs, 0 outputs"),
        ("codecontests", {"description": "?"}, "none of the known columns"),
        ("hh-rlhf", {"chosen": "Hello", "rejected": "Go away"}, "prompt"),
        ("safe-rlhf", {**SAFE_RLHF, "safer_response_id": 2}, "safer_response_id"),
    ],
)
def test_a_row_that_is_none_of_the_task_is_named(tmp_path, task, row, words):
    good = {"gsm8k": GSM8K, "humaneval": HUMAN_EVAL, "mbpp": MBPP, "apps": APPS, "codecontests": CODE_CONTESTS}
    first = good.get(task, HH if task == "hh-rlhf" else SAFE_RLHF)
    with pytest.raises(DataError, match=words) as caught:
        questions_of(tmp_path, task, {**first, "task_id": "another"}, row)
    assert f"{task}.jsonl:2" in str(caught.value)


def test_two_rows_with_one_id_are_refused_and_a_limit_is_a_limit(tmp_path):
    with pytest.raises(DataError, match=r"humaneval.jsonl:2.*'HumanEval/0'"):
        questions_of(tmp_path, "humaneval", HUMAN_EVAL, HUMAN_EVAL)
    assert len(load_questions(find_task("humaneval"), str(tmp_path / "humaneval.jsonl"), limit=1)) == 1
    with pytest.raises(InputError, match="unknown --task `humanevil`"):
        find_task("humanevil")


def test_completions_end_before_the_first_stop_string():
    assert cut_at("    return 1\ndef g():\n    pass\n# x", ("\n#", "\ndef ")) == "    return 1"
    assert cut_at("all", ("\n#",)) == "all"


@pytest.mark.skipif(not REAL_PAIRS.exists(), reason="the development pairs are not here")
def test_every_real_pair_of_hh_is_a_question_of_its_own():
    questions = load_questions(find_task("hh-rlhf"), str(REAL_PAIRS))
    assert len(questions) == 1500
    for question in questions:
        assert question.prompt.endswith("\n\nAssistant:")
        assert question.prompt + question.liked == question.row["chosen"]
        assert question.prompt + question.disliked == question.row["rejected"]
