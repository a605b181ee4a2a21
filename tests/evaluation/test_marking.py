"""Programs marked in the sandbox: pass@k and n@k of a file against enumeration; groups; who runs how often."""

from itertools import combinations
from statistics import fmean

import pytest
import torch
from benchmark_rows import APPS, APPS_CALL, CODE_CONTESTS, HUMAN_EVAL, MATH, MBPP, questions_of

from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import DataError, InputError
from meshift.evaluation.evaluate import Request, evaluate
from meshift.evaluation.generating import Drawing
from meshift.evaluation.marking import Marks, Wanted, estimates, mark_answers, mark_programs
from meshift.evaluation.programs import SandboxedTests, read_code_problem
from meshift.evaluation.saved import Saved
from meshift.evaluation.tasks import find_task
from meshift.generation.params import SamplingParams

RIGHT = "print(sum(map(int, input().split())))"
ALSO_RIGHT = "a = [int(x) for x in input().split()]\nprint(sum(a))"
PUBLIC_ONLY = "print(3)"  # passes the public test, and prints the same for every input
OTHER_PUBLIC_ONLY = "a, b = map(int, input().split()[:2])\nprint(a + b if a < 9 else 'x')"
WRONG = "print(input())"
LOOP = "while True: pass"


@pytest.fixture(scope="module")
def sandboxed():
    """The sandbox, which counts the programs that it runs."""
    seen = []
    tests = SandboxedTests(
        UnitTestsConfig(timeout_s=1.0, num_workers=2), lambda what, done, total: seen.append((what, done, total))
    )
    tests.seen = seen
    yield tests
    tests.close()


def completed(question, *programs):
    return [Saved(id=question.id, sample=j, completion=program) for j, program in enumerate(programs)]


def test_each_format_is_decided_by_its_own_tests(tmp_path, sandboxed):
    rows = {
        "humaneval": (HUMAN_EVAL, "    return x + x", "    return x * x"),
        "mbpp": (MBPP, "def add(a, b):\n    return a + b", "def add(a, b):\n    return abs(a) + b"),
        "apps": (APPS, RIGHT, "print(3)"),
        "codecontests": (CODE_CONTESTS, RIGHT, "print(3)"),
    }
    for task, (row, right, wrong) in rows.items():
        questions = questions_of(tmp_path, task, row)
        [marks] = mark_programs(questions, [completed(questions[0], right, wrong)], sandboxed)
        assert marks.right == [True, False], task
        assert marks.wrong[0] == ""
        assert marks.wrong[1], task
    [call] = questions_of(tmp_path, "apps", APPS_CALL)
    solution = (
        "Here it is:\n```python\nclass Solution:\n    def count(self, numbers):\n        return len(numbers)\n```"
    )
    [marks] = mark_programs([call], [completed(call, solution, "nothing")], sandboxed)
    assert marks.right == [True, False]


def test_equal_programs_of_a_problem_run_once_and_progress_is_counted(tmp_path, sandboxed):
    questions = questions_of(tmp_path, "codecontests", CODE_CONTESTS)
    sandboxed.seen.clear()
    [marks] = mark_programs(questions, [completed(questions[0], RIGHT, WRONG, RIGHT, RIGHT)], sandboxed)
    assert marks.right == [True, False, True, True]
    assert sandboxed.seen == [("programs tested", 1, 2), ("programs tested", 2, 2)]


def test_the_part_of_tests_that_pass_is_told_where_all_of_them_are_run(tmp_path):
    """The program fails the first of two tests and passes the other: stopped at the first, it would get 0."""
    questions = questions_of(tmp_path, "apps", APPS)
    params = SamplingParams(max_new_tokens=1)
    drawing = Drawing(params=params, num_samples=1, seed=0, chat=False, dtype=torch.float32)
    for credit, part in (("partial", [1 / 2]), ("all", [])):
        config = UnitTestsConfig(credit=credit, num_workers=1)
        request = Request(task=find_task("apps"), data="", drawing=drawing, wanted=Wanted(), tests=config)
        results = evaluate(request, questions, [completed(questions[0], "print(12)")])
        assert [row["right"] for row in results.rows] == [False]
        assert [row["tests_passed"] for row in results.rows if "tests_passed" in row] == part
        assert [one.value for name, one in results.metrics.items() if name == "tests passed"] == part
        assert results.metrics["pass@1"].value == 0.0


def test_n_at_k_submits_what_passes_the_public_tests_from_the_largest_cluster_on(tmp_path, sandboxed):
    """Eight programs of one problem: three pass all tests and print alike, three pass the public test alone and
    print alike among themselves in other ways, two are wrong at once."""
    questions = questions_of(tmp_path, "codecontests", CODE_CONTESTS)
    programs = [RIGHT, PUBLIC_ONLY, WRONG, ALSO_RIGHT, OTHER_PUBLIC_ONLY, RIGHT, LOOP, PUBLIC_ONLY]
    [marks] = mark_programs(questions, [completed(questions[0], *programs)], sandboxed, with_public=True)
    assert marks.right == [True, False, False, True, False, True, False, False]
    assert marks.kept == [True, True, False, True, True, True, False, True]
    assert marks.behaviours is not None
    assert marks.behaviours[0] == marks.behaviours[3] == marks.behaviours[5]
    assert marks.behaviours[1] == marks.behaviours[7]
    assert len({marks.behaviours[i] for i in (0, 1, 4)}) == 3
    wanted = Wanted(ks=(1, 4), n_at_ks=((1, 8), (2, 5)))
    found = estimates(questions, [marks], wanted)
    assert found["pass@1"].value == pytest.approx(3 / 8)
    assert found["pass@4"].value == pytest.approx(fmean(any(c) for c in combinations(marks.right, 4)))
    assert found["1@8 clustered"].value == 1.0, "the right programs are the largest cluster"
    assert found["1@8 filtered"].value == pytest.approx(3 / 6)
    assert found["2@5 filtered"].value == pytest.approx(by_hand_filtered(marks, n=2, k=5))
    # 200 random choices of five: within three standard errors of the chance over all choices.
    exact = by_hand_clustered(marks, n=2, k=5)
    assert found["2@5 clustered"].value == pytest.approx(exact, abs=3 * (exact * (1 - exact) / 200) ** 0.5)


def by_hand_filtered(marks, n, k):
    solved = []
    for chosen in combinations(range(len(marks.right)), k):
        kept = [i for i in chosen if marks.kept[i]]
        solved.append(
            fmean(any(marks.right[i] for i in submitted) for submitted in combinations(kept, min(n, len(kept))))
        )
    return fmean(solved)


def by_hand_clustered(marks, n, k):
    """One of each of the two largest clusters, over every order of clusters of one size; all samples of a cluster
    are equally right here."""
    solved = []
    for chosen in combinations(range(len(marks.right)), k):
        sizes = {}
        for i in chosen:
            if marks.kept[i]:
                sizes.setdefault(marks.behaviours[i], []).append(marks.right[i])
        clusters = sorted(sizes.values(), key=len, reverse=True)
        right = next((c for c in clusters if c[0]), None)
        if right is None:
            solved.append(0.0)
            continue
        larger = sum(len(c) > len(right) for c in clusters)
        equal = sum(len(c) == len(right) for c in clusters)
        solved.append(min(1.0, max(0, n - larger) / equal))
    return fmean(solved)


def test_the_first_tests_are_public_where_the_command_says_so(tmp_path):
    [question] = questions_of(tmp_path, "mbpp", MBPP)
    problem = read_code_problem(question.row, 2)
    assert (len(problem.whole), len(problem.public), problem.inputs) == (3, 2, ())
    [contest] = questions_of(tmp_path, "codecontests", CODE_CONTESTS)
    problem = read_code_problem(contest.row, None)
    assert problem.public.inputs == [("1 2\n", "3\n")]
    assert problem.inputs == ("5 5\n", "9 1 1\n")
    assert read_code_problem({**contest.row, "generated_tests": None}, None).inputs == ("1 2\n",)


def test_functions_have_no_clusters_and_all_are_kept_where_no_test_is_public(tmp_path, sandboxed):
    questions = questions_of(tmp_path, "mbpp", MBPP)
    saved = [completed(questions[0], "def add(a, b):\n    return a + b", "def add(a, b):\n    return 0")]
    [marks] = mark_programs(questions, saved, sandboxed, with_public=True)
    assert (marks.kept, marks.behaviours) == ([True, True], None)
    found = estimates(questions, [marks], Wanted(n_at_ks=((1, 2),)))
    assert found["1@2 unfiltered"].value == 0.5
    assert not {"1@2 filtered", "1@2 clustered", "1@2 clustered unfiltered"} & found.keys()


def test_one_problem_without_inputs_leaves_the_clusters_of_the_others(caplog):
    questions = [type("Q", (), {"group": ""})()] * 3
    grouped = {"kept": [True] * 3, "of_programs": True, "filters": True}
    marks = [
        Marks(right=[True, True, False], behaviours=["a", "a", "b"], **grouped),
        Marks(right=[False] * 3, **grouped),
        Marks(right=[True, False, False], behaviours=["a", "b", "b"], **grouped),
    ]
    found = estimates(questions, marks, Wanted(n_at_ks=((1, 3), (2, 3))))
    assert (found["1@3 clustered"].value, found["1@3 clustered"].num) == (1 / 2, 2)
    assert (found["2@3 clustered"].value, found["2@3 clustered"].num) == (1.0, 2)
    assert (found["1@3 filtered"].value, found["1@3 filtered"].num) == (pytest.approx(1 / 3), 3)
    assert caplog.text.count("n@k clustered is that of 2 of 3 questions") == 1
    caplog.clear()
    assert "1@3 clustered" not in estimates(questions[:1], marks[1:2], Wanted(n_at_ks=((1, 3),)))
    assert not caplog.text


def test_what_nothing_filters_is_not_called_filtered_and_what_some_tests_filter_is_told(caplog):
    questions = [type("Q", (), {"group": ""})()] * 2
    one = {"right": [True, False], "kept": [True, True], "behaviours": ["a", "b"], "of_programs": True}
    wanted = Wanted(n_at_ks=((1, 2),))
    found = estimates(questions, [Marks(**one), Marks(**one)], wanted)
    assert {name for name in found if "@2" in name} == {"1@2 unfiltered", "1@2 clustered unfiltered"}
    assert found["1@2 unfiltered"].value == 0.5, "pass@1"
    assert "n@k is of samples that nothing filters" in caplog.text
    assert "--public-tests" in caplog.text
    caplog.clear()
    found = estimates(questions, [Marks(**one), Marks(**one | {"kept": [True, False]}, filters=True)], wanted)
    assert found["1@2 filtered"].value == (0.5 + 1) / 2
    assert "only 1 of 2 questions have public tests" in caplog.text


def test_groups_have_estimates_of_their_own():
    questions = [type("Q", (), {"group": group})() for group in ("easy", "hard", "easy")]
    marks = [Marks(right=[True, True]), Marks(right=[False, True]), Marks(right=[False, False])]
    found = estimates(questions, marks, Wanted(ks=(1, 2)))
    assert {name: one.value for name, one in found.items()} == {
        "accuracy": 0.5,
        "pass@2": pytest.approx(2 / 3),
        "accuracy (easy)": 0.5,
        "accuracy (hard)": 0.5,
        "pass@2 (easy)": 0.5,
        "pass@2 (hard)": 1.0,
    }
    assert found["accuracy"].num == 3


def test_what_cannot_be_estimated_is_said(tmp_path, sandboxed):
    with pytest.raises(InputError, match="k = 10 need 10 samples of each question, and there are 4"):
        Wanted(ks=(1, 10)).check(4)
    questions = questions_of(tmp_path, "apps", {**APPS, "input_output": '{"inputs": [], "outputs": []}'})
    with pytest.raises(DataError, match=r"apps.jsonl:1: the problem has no tests"):
        mark_programs(questions, [completed(questions[0], RIGHT)], sandboxed)


def test_mathematical_answers_are_compared_as_such_and_a_truth_that_is_none_names_its_row(tmp_path):
    pytest.importorskip("math_verify")
    questions = questions_of(tmp_path, "math", MATH)
    answers = ["\\boxed{0.5}", "So it is $\\frac{2}{4}$.", "\\boxed{\\frac{1}{3}}", ""]
    [marks] = mark_answers(find_task("math"), questions, [completed(questions[0], *answers)])
    assert marks.right == [True, True, False, False]
    bad = questions_of(tmp_path, "math", {**MATH, "solution": "So it is \\boxed{}."})
    with pytest.raises(DataError, match=r"math.jsonl:1: math-verify raised"):
        mark_answers(find_task("math"), bad, [completed(bad[0], "1")])
