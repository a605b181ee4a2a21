"""Rows as the benchmarks' own files have them, made up here, and a way to load them as a task's questions."""

import json

from meshift.evaluation.tasks import find_task, load_questions

HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-1) == -2\n",
    "entry_point": "double",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function that adds.",
    "code": "def add(a, b):\n    return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "task_id": 12,
    "prompt": "Write a function that adds.",
    "code": "def add(a, b):\n    return a + b",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(add(0.1, 0.2), 0.3)"],
}
APPS = {
    "problem_id": 7,
    "question": "Add the numbers of a line.",
    "input_output": json.dumps({"inputs": ["1 2\n", "3 4 5\n"], "outputs": ["3\n", "12\n"]}),
    "starter_code": "",
    "difficulty": "introductory",
}
APPS_CALL = {
    "problem_id": 8,
    "question": "Count.",
    "input_output": json.dumps({"fn_name": "count", "inputs": [[[1, 2]]], "outputs": [2]}),
    "starter_code": "class Solution:\n    def count(self, numbers):\n",
    "difficulty": "interview",
}
CODE_CONTESTS = {
    "name": "1_A. Sums",
    "description": "Add the numbers of a line.",
    "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
    "private_tests": {"input": ["2 2\n"], "output": ["4\n"]},
    "generated_tests": {"input": ["5 5\n", "9 1 1\n"], "output": ["10\n", "11\n"]},
    "time_limit": {"seconds": 1, "nanos": 0},
}
GSM8K = {"question": "How many legs have two dogs?", "answer": "2 dogs have <<2*4=8>>8 legs.\n#### 8"}
MATH = {"problem": "What is half of one?", "level": "Level 1", "solution": "It is $\\boxed{\\frac{1}{2}}$."}
HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello, how are you?",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Go away.",
}
SAFE_RLHF = {
    "prompt": "How are locks picked?",
    "response_0": "With a tension wrench.",
    "response_1": "I cannot say.",
    "better_response_id": 0,
    "safer_response_id": 1,
    "is_response_0_safe": False,
    "is_response_1_safe": True,
}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions_of(tmp_path, task, *rows):
    return load_questions(find_task(task), str(write_rows(tmp_path / f"{task}.jsonl", rows)))
