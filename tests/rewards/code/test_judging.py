"""Right programs pass and wrong ones do not, in each form that problems have; limits; what the reward says."""

import os
import tempfile
import time
from pathlib import Path

import pytest
from test_problems import APPS_CALL, APPS_STDIN, CODE_CONTESTS, HEAD, HUMAN_EVAL, MBPP

from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import ConfigError
from meshift.rewards.code.extraction import complete_function
from meshift.rewards.code.judging import Judge
from meshift.rewards.code.problems import Problem, read_problem
from meshift.rewards.code.unit_tests import UnitTests, program_of
from meshift.rewards.sandbox.pool import Sandbox
from meshift.rewards.sandbox.probes import probe


@pytest.fixture(scope="module")
def judge():
    """`judge(problem, program, **keys of Judge)` -> verdict."""
    found = probe()
    sandbox = Sandbox(found, 2**28, 1)

    def run(problem, program, **keys):
        how = Judge(layers=found.layers, **({"timeout_s": 1.0} | keys))
        [verdict] = sandbox.map(lambda slot, code: how.judge(slot, problem, code), [program])
        return verdict

    yield run
    sandbox.close()


@pytest.mark.parametrize(
    ("row", "right", "wrong"),
    [
        (CODE_CONTESTS, "print(sum(map(int, input().split())))", "print(input())"),
        (APPS_STDIN, "import sys\nprint(sum(map(int, sys.stdin.read().split())))", "print(3)"),
        (APPS_CALL, "class Solution:\n    def count(self, t, l): return {3: (4,)} if t == {1: 2} else 0", "x = 1"),
        (MBPP, "def sum(a, b): return a + b", "def sum(a, b): return 3"),
    ],
)
def test_right_programs_pass_and_wrong_ones_do_not(judge, row, right, wrong):
    problem = read_problem(row, "")
    assert judge(problem, right).passed
    assert not judge(problem, wrong).passed


TRUTH = APPS_CALL["input_output"]
BODY = "return {3: [4]} if table == {1: 2} and letter == 'a' else 0"


@pytest.mark.parametrize(
    "row",
    [
        APPS_CALL,
        APPS_CALL | {"starter_code": "def count(table, letter):"},
        APPS_CALL | {"starter_code": ""},
        {"ground_truth": TRUTH},
        {"reward_model": {"ground_truth": TRUTH, "style": "rule"}},
    ],
    ids=["a class in the starter code", "a function there", "nothing there", "verl", "verl rows"],
)
def test_a_right_program_passes_by_a_function_or_by_a_method_of_solution_in_every_schema(judge, row):
    """Who answers a problem of functions chooses the form: data does not say it for all of them."""
    problem = read_problem(row, "")
    function = f"def count(table, letter):\n    {BODY}\n"
    method = f"class Solution:\n    def count(self, table, letter):\n        {BODY}\n"
    for right in (function, method, method + "\ncount = 3", "class Solution: pass\n" + function):
        assert judge(problem, right).passed
        assert not judge(problem, right.replace("[4]", "[5]")).passed
    raising = method.replace(BODY, "raise NameError(letter)")
    assert not judge(problem, raising + function).passed, "the method is the program's answer"


@pytest.mark.parametrize("row", [APPS_CALL, {"reward_model": {"ground_truth": TRUTH}}], ids=["APPS", "verl"])
@pytest.mark.parametrize("first", ["", "from __future__ import annotations\n"], ids=["", "future"])
def test_apps_starter_code_would_not_load_without_the_names_that_its_own_tests_give(judge, row, first):
    problem = read_problem(row, "")
    method = f"class Solution:\n    def count(self, table: List[int], letter: str) -> int:\n        {BODY}\n"
    assert judge(problem, program_of(problem, f"```python\n{first}{method}```")).passed


def test_programs_of_apps_have_the_modules_that_its_own_tests_import(judge):
    problem = read_problem(APPS_STDIN, "")
    said = "d = defaultdict(int)\nfor x in sys.stdin.read().split(): d[0] += int(x)\nprint(floor(d[0]))"
    assert judge(problem, program_of(problem, said)).passed
    assert not judge(problem, program_of(problem, f"sys = 1\n{said}")).passed, "a program's own names count"
    assert "import" not in program_of(read_problem(CODE_CONTESTS, ""), said)


def test_numbers_of_more_digits_than_python_reads_at_most_would_stop_the_run_or_fail_right_programs(judge):
    nines = "9" * 6000
    called = f'{{"fn_name": "f", "inputs": [[6000], [-{nines}]], "outputs": [{nines}, -{nines}]}}'
    problem = read_problem({"input_output": called}, "")
    assert judge(problem, "def f(n): return 10**n - 1 if n > 0 else int(str(n))").passed
    assert not judge(problem, "def f(n): return 10**n if n > 0 else n").passed
    verdict = judge(problem, "def f(n): return 10**6000 if n > 0 else n")
    assert verdict.num_passed == 1
    assert "gave 1000" in verdict.wrong
    printed = Problem(inputs=[("6000", nines)])
    assert judge(printed, "print(10**int(input()) - 1)").passed
    assert judge(Problem(inputs=[(nines, "0")]), "print(int(input()) % 9)").passed


def test_capital_letters_would_decide_in_code_contests(judge):
    row = {"public_tests": {"input": ["1"], "output": ["YES\n2\n"]}}
    assert judge(read_problem(row, ""), "print('Yes', 2.0)").passed
    assert not judge(
        read_problem({"input_output": {"inputs": ["1"], "outputs": ["YES"]}}, ""), "print('Yes')"
    ).passed


def test_a_function_completed_after_its_head(judge):
    problem = read_problem(HUMAN_EVAL, HEAD)
    for completion, passes in (("    return x + 1\n", True), ("    return x\n", False)):
        program = complete_function(problem.opening, problem.entry_point, completion)
        assert judge(problem, program).passed is passes


def test_the_prompts_own_helpers_are_not_the_programs(judge):
    """In HumanEval 38 and 50 tests encode by a helper of the prompt: a program must not choose what that does."""
    head = "def encode(s):\n    return s[::-1]\n\ndef decode(s):\n    '''Undo encode.'''\n"
    row = {"test": "def check(candidate):\n    assert candidate(encode('ab')) == 'ab'", "entry_point": "decode"}
    problem = read_problem(row, head)
    assert judge(problem, head + "    return s[::-1]").passed
    cheat = head + "    return s\ndef encode(s): return s"
    assert not judge(problem, cheat).passed
    names = {}
    exec(cheat + "\n" + row["test"] + "\ncheck(decode)", names)  # one interpreter for both believes it


def test_partial_results_are_told_test_by_test_even_after_a_crash_or_a_hang(judge):
    problem = Problem(tests=[{"code": f"assert f({i}) == {i}"} for i in range(5)])
    program = (
        "import os, time\ndef f(x):\n    if x == 1: os._exit(0)\n    if x == 2: time.sleep(9)\n"
        "    if x == 3: raise KeyError('three')\n    return x"
    )
    verdict = judge(problem, program, timeout_s=0.2)
    assert (verdict.num_passed, verdict.num_run, verdict.num_timeouts) == (2, 5, 1)
    assert verdict.wrong.startswith("test 1: ")
    outputs = Problem(inputs=[(str(i), str(i)) for i in range(4)])
    verdict = judge(outputs, "x = int(input())\nprint(1 / 0 if x == 1 else x if x < 3 else 'three')")
    assert (verdict.num_passed, verdict.num_run) == (2, 4)
    assert verdict.wrong == "test 1: ended with ZeroDivisionError: division by zero"


def test_one_failure_is_enough_where_all_tests_must_pass(judge):
    outputs = Problem(inputs=[(str(i), str(i)) for i in range(9)])
    assert judge(outputs, "print(0)", stop_early=True).num_run == 2


def test_the_right_output_of_a_program_that_crashes_or_hangs_does_not_pass(judge):
    problem = Problem(inputs=[("", "5")])
    assert judge(problem, "print(5)").passed
    assert not judge(problem, "print(5)\nraise ValueError").passed
    assert not judge(problem, "print(5, flush=True)\nwhile True: pass", timeout_s=0.2).passed
    assert not judge(problem, "print(5, flush=True)\nimport ctypes\nctypes.string_at(0)").passed


def test_a_program_that_does_not_load_in_time_is_not_loaded_again_for_every_test(judge):
    problem = Problem(tests=[{"code": "f()"}] * 5)
    started = time.monotonic()
    verdict = judge(problem, "while True: pass\ndef f(): pass", timeout_s=0.1)
    assert (verdict.num_passed, verdict.num_run, verdict.num_timeouts) == (0, 5, 5)
    assert time.monotonic() - started < 6


def test_all_tests_together_have_a_limit(judge):
    problem = Problem(inputs=[("", "1")] * 50)
    started = time.monotonic()
    verdict = judge(problem, "import time\ntime.sleep(9)", timeout_s=0.1, total_timeout_s=1.0)
    assert time.monotonic() - started < 16
    assert not verdict.passed
    assert verdict.num_run <= 3
    functions = Problem(tests=[{"code": "f()"}] * 50)
    verdict = judge(functions, "import time\ndef f(): time.sleep(9)", timeout_s=0.1, total_timeout_s=1.0)
    assert time.monotonic() - started < 16
    assert not verdict.passed


def test_a_problems_own_limit_counts_if_it_is_lower(judge):
    busy = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint(1)"
    for own, passes in ((None, True), (5.0, True), (0.1, False)):
        assert judge(Problem(inputs=[("", "1")], time_limit_s=own), busy).passed is passes
    large = "x = bytearray(100 << 20)\nprint(1)"
    for own, passes in ((None, True), (64 * 2**20, False)):
        assert judge(Problem(inputs=[("", "1")], memory_limit_bytes=own), large).passed is passes


def test_what_programs_of_contests_do_works(judge):
    problem = Problem(inputs=[("3\n1 2 3\n", "6 ok")])
    for program in (
        "import sys\nn, *x = map(int, sys.stdin.buffer.read().split())\nsys.stdout.write(f'{sum(x)}\\nok')",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(2**26)\n"
        "def go(x): return x[0] + go(x[1:]) if x else 0\n"
        "def main():\n    input()\n    print(go(list(map(int, input().split()))))\n    print('ok')\n"
        "threading.Thread(target=main).start()",
        "if __name__ == '__main__':\n    open(0).readline()\n    print(6); print('ok'); exit()",
        "from collections import *\nfrom heapq import *\nimport numbers, decimal, fractions\ninput()\n"
        "print(sum(Counter(map(int, input().split())).elements()), 'ok', end='')\nquit(0)",
        "import os, io\nf = io.BytesIO(os.read(0, 99))\nf.readline()\n"
        "print(sum(map(int, f.readline().split())), 'ok')",
        "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n"
        "    f.write('6 ok'); f.seek(0); print(f.read())",
        "import atexit\natexit.register(print, '6 ok')",
    ):
        assert judge(problem, program, memory_bytes=2**28).passed, program


def test_a_program_would_be_compiled_with_the_sandboxs_own_future_imports(judge):
    """With annotations that nobody evaluates, one that lacks an import passes here and nowhere else."""
    function = "def first(x: List[int]):\n    return x[0]\n"
    asserts = Problem(tests=[{"code": "assert first([1]) == 1"}])
    output = Problem(inputs=[("", "1")])
    for problem, program in ((asserts, function), (output, function + "print(first([1]))")):
        assert judge(problem, "from typing import List\n" + program).passed
        assert judge(problem, "from __future__ import annotations\n" + program).passed
        verdict = judge(problem, program)
        assert not verdict.passed
        assert "name 'List' is not defined" in verdict.wrong
    setup = Problem(tests=[{"code": "assert f(0) == 0 and kinds == {'x': int}"}], setup=SETUP_OF_TYPES)
    assert judge(setup, "def f(x): return x").passed


SETUP_OF_TYPES = "def g(x: int): return x\nkinds = g.__annotations__"


def test_what_functions_may_be_given_and_give_back(judge):
    tests = [
        "assert f([1, (2, 'x')], {'a': {1, 2}}, None) == ([1, (2, 'x')], {'a': {1, 2}}, None)",
        "assert f(2**100, -1.5, 1j) == (2**100, -1.5, 1j)",
        "assert f(b'a', frozenset([1]), True)[2] is True",
        "assert type(f((1,), 2, 3)[0]) is tuple and type(f([1], 2, 3)[0]) is list",
        "import math\nassert math.isnan(f(math.nan, math.inf, 0)[0])",
        "x = [3, 1, 2]\nsort(x)\nassert x == [1, 2, 3]",
        "x = {}\nfill(x, key='k')\nassert x == {'k': [1]}",
        "assert list(count(3)) == [0, 1, 2] and [*zip(count(2), 'ab')] == [(0, 'a'), (1, 'b')]",
        "s = Stack()\ns.push(4)\ns.push(5)\nassert len(s) == 2 and s.items[0] == 4 and s.pop() == 5",
        "try:\n    fail()\nexcept ValueError as error:\n    assert str(error) == 'no'\n"
        "else:\n    raise AssertionError",
        "assert sorted([3, 1, 2], key=negative) == [3, 2, 1]",
        "from collections import Counter\nassert counted('aab') == Counter('aab')",
        "from collections import deque\nassert f(deque([1]), 0, 0)[0] == deque([1])",
    ]
    program = (
        "from collections import Counter\ndef f(a, b, c): return a, b, c\ndef sort(x): x.sort()\n"
        "def fill(x, key): x[key] = [1]\ndef count(n): yield from range(n)\nclass Stack:\n"
        "    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n    def __len__(self): return len(self.items)\n"
        "def fail(): raise ValueError('no')\ndef negative(x): return -x\ndef counted(s): return Counter(s)"
    )
    for test in tests:
        verdict = judge(Problem(tests=[{"code": test}]), program)
        assert verdict.passed, (test, verdict.wrong)


def test_packages_are_there_for_programs_that_are_given_them_and_for_no_others():
    numpy = pytest.importorskip("numpy")
    program = "import numpy as np\ndef f(x): return np.array(x).sum()"
    for packages, reward in (([str(Path(numpy.__file__).parents[1])], 1.0), ([], 0.0)):
        function = UnitTests(UnitTestsConfig(num_workers=1, packages=packages))
        logged = {}
        rewards = function(["p"], [program], logged.__setitem__, tests=[["assert f([1, 2]) == 3"]])
        assert rewards == [reward]
        function._sandbox.close()
    with pytest.raises(ConfigError, match="no folder"):
        UnitTests(UnitTestsConfig(packages=["/nowhere"]))


def test_packages_below_tmp_are_there_too_beside_a_programs_own_tmp():
    program = "import os, shop\ndef f(x): return [shop.double(x), os.listdir('/tmp')]"
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "shop.py").write_text("def double(x): return 2 * x")
        function = UnitTests(UnitTestsConfig(num_workers=1, packages=[folder]))
        rewards = function(["p"], [program], lambda *_: None, tests=[["assert f(2) == [4, []]"]])
        function._sandbox.close()
    assert rewards == [1.0]


def test_rewards_are_all_or_nothing_or_partial_and_none_without_tests():
    rows = {
        "tests": [
            ["assert f(1) == 1", "assert f(2) == 2"],
            ["assert f(1) == 1", "assert f(2) == 2"],
            [],
        ]
    }
    completions = ["```python\ndef f(x): return x\n```", "def f(x): return 1", "def f(x): return 1"]
    as_messages = [[{"role": "assistant", "content": text}] for text in completions]
    for credit, second in (("all", 0.0), ("partial", 0.5)):
        function = UnitTests(UnitTestsConfig(credit=credit, num_workers=2))
        for given in (completions, as_messages):
            logged = {}
            rewards = function(["p"] * 3, given, logged.__setitem__, **rows)
            assert rewards == [1.0, second, None]
            assert logged["solved"] == [1.0, 0.0]
            assert logged.get("tests_passed") == (None if credit == "all" else [1.0, 0.5])
            assert logged["without_tests"] == [0.0, 0.0, 1.0]
        function._sandbox.close()
