"""The program in a completion."""

import pytest

from meshift.rewards.code.extraction import complete_function, extract_code
from meshift.rewards.code.problems import read_problem
from meshift.rewards.code.unit_tests import program_of


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("print(1)", "print(1)"),
        ("Here:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```py\na = 1\n```\nbetter:\n```python\na = 2\n```", "a = 2\n"),
        ("```python\na = 1\n```\nIt prints\n```text\n1\n```", "a = 1\n"),
        ("```\na = 1\n```", "a = 1\n"),
        ("```bash\nls\n```\n```\na = 1\n```", "a = 1\n"),
        ("```python\ncut off here", "cut off here"),
        ("<think>\n```python\nwrong\n```\n</think>\n```python\nright\n```", "right\n"),
        ("  ```python\n  a = 1\n  ```", "  a = 1\n"),
        ("```Python title=x\na = '```'\nb = 1\n```", "a = '```'\nb = 1\n"),
        ("```python\n```", ""),
        ("", ""),
    ],
)
def test_the_last_python_block_is_the_program(completion, code):
    assert extract_code(completion) == code


def test_a_block_that_shows_how_the_function_is_used_would_be_taken_for_the_function():
    answer = "```python\ndef add(a, b): return a\n```\nNo:\n```python\ndef add(a, b): return a + b\n```\nSo:\n"
    used = answer + "```python\nprint(add(2, 3))\n```\n```text\n5\n```"
    assert extract_code(used) == "print(add(2, 3))\n"
    assert extract_code(used, ("add",)) == "def add(a, b): return a + b\n"
    assert extract_code(used, ("ad", "other")) == "print(add(2, 3))\n"
    assert result_of(complete_function(OPENING, "add", used), "add(2, 3)") == 5
    method = "```python\nclass Solution:\n    def add(self, a, b): return a + b\n```\n```python\nadd(1, 2)\n```"
    assert extract_code(method, ("add",)).startswith("class Solution")
    for row in ({"test_list": ["assert add(2, 3) == 5"], "code": "def add(a, b): return a + b"}, APPS_ADD):
        assert "return a + b" in program_of(read_problem(row, ""), used)


APPS_ADD = {"input_output": {"fn_name": "add", "inputs": [[2, 3]], "outputs": [5]}}
OPENING = "from typing import List\n\n\ndef add(a: int, b: int) -> int:\n    '''Sum.'''\n"


def result_of(program, call):
    names = {}
    exec(program, names)
    return eval(call, names)


@pytest.mark.parametrize(
    "completion",
    [
        "    return a + b",
        "    return a + b\n\n\nprint(add(1, 2, 3))",
        "    return a + b\n\ndef other():\n    broken broken",
        "    c = a\n    return c + b\n# Test\nassert False",
        "```python\ndef add(a: int, b: int) -> int:\n    return a + b\n```",
        "Sure:\n```python\ndef add(a, b):\n    x: List[int] = [a, b]\n    return sum(x)\n```",
        "```python\n    return a + b\n```",
    ],
)
def test_a_completion_of_a_function_is_put_after_its_head(completion):
    assert result_of(complete_function(OPENING, "add", completion), "add(2, 3)") == 5


def test_a_function_of_a_longer_name_is_not_the_one_asked_for():
    program = complete_function(OPENING, "add", "    return 5\n\ndef add_all(): pass")
    assert result_of(program, "add(0, 0)") == 5


def test_long_hostile_texts_are_read_in_time_that_grows_with_their_length():
    import time

    started = time.monotonic()
    for text in (
        "```\n" * 50_000,
        "```python" * 50_000,
        " " * 200_000,
        "</think>" * 50_000,
        "```" + " " * 200_000,
        "\n" * 200_000,
    ):
        extract_code(text)
        complete_function(OPENING, "add", text)
        complete_function(OPENING, "add", f"```python\n{text}")
    assert time.monotonic() - started < 5
