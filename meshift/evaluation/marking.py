"""Completions of questions with an answer, or with tests, marked right or wrong; and what follows from the marks.

It knows nothing of models: it needs the completions' texts alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from meshift.config.sections import RewardFunctionConfig
from meshift.errors import DataError, InputError, RewardError
from meshift.evaluation.answers import final_number, first_number, is_right
from meshift.evaluation.estimators import (
    Estimate,
    Sample,
    by_group,
    clustered_n_at_k,
    filtered_n_at_k,
    pass_at_k,
    share,
)
from meshift.evaluation.programs import CodeProblem, ProgramTests, read_code_problem
from meshift.evaluation.saved import Saved
from meshift.evaluation.tasks import Question, Task
from meshift.rewards.code.unit_tests import program_of
from meshift.rewards.configured import load_functions
from meshift.rewards.functions import WeightedFunction, scores_of
from meshift.rewards.samples import Samples

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Marks:
    """Of one question: which samples are right; of programs, which pass the public tests and how they behave.

    Where the question has no public tests (`filters` is false) all are `kept`. `tests_passed` is the part of the
    tests that each passes, and empty where not all of them were run.
    """

    right: list[bool]
    of_programs: bool = False
    kept: list[bool] = field(default_factory=list)
    filters: bool = False
    behaviours: list[Any] | None = None
    tests_passed: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which estimates: k of pass@k, (n, k) of n@k, and the seed of random choices among samples."""

    ks: Sequence[int] = (1,)
    n_at_ks: Sequence[tuple[int, int]] = ()
    seed: int = 0

    def check(self, num_samples: int) -> None:
        """Raise `InputError` where more samples are asked for than each question has."""
        for k in [*self.ks, *(k for _, k in self.n_at_ks)]:
            if not 1 <= k <= num_samples:
                raise InputError(
                    f"pass@k and n@k with k = {k} need {k} samples of each question, and there are {num_samples}; "
                    f"raise --num-samples, or lower k"
                )


def mark_answers(task: Task, questions: Sequence[Question], saved: Sequence[Sequence[Saved]]) -> list[Marks]:
    """By the last number, or for MATH by `math-verify`. Raises `ConfigError` without that."""
    if task.name == "math":
        return _mark_maths(questions, saved)
    return [_mark_numbers(question.truth, of_one) for question, of_one in zip(questions, saved, strict=True)]


def _mark_numbers(truth: str, samples: Sequence[Saved]) -> Marks:
    found = [final_number(one.completion) for one in samples]
    right = [is_right(one.completion, truth) for one in samples]
    said = ["no number" if number is None else f"{number:f}" for number in found]
    expected = first_number(truth)
    wrong = ["" if ok else f"{read} in place of {expected:f}" for ok, read in zip(right, said, strict=True)]
    return Marks(right=right, wrong=wrong)


def maths_function() -> WeightedFunction:
    """The reward function `maths`. Raises `ConfigError` where `math-verify` is not installed."""
    [function] = load_functions([RewardFunctionConfig(function="maths", on_error="skip")])
    return function


def _mark_maths(questions: Sequence[Question], saved: Sequence[Sequence[Saved]]) -> list[Marks]:
    function = maths_function()
    flat = [(q, one) for q, of_one in zip(questions, saved, strict=True) for one in of_one]
    texts = [one.completion for _, one in flat]
    blank = [""] * len(flat)
    samples = Samples(
        prompts=blank,
        completions=texts,
        completion_ids=[[] for _ in flat],
        texts=texts,
        prompt_texts=blank,
        queries=texts,
        columns={"ground_truth": [q.truth for q, _ in flat]},
        where=[q.where for q, _ in flat],
    )
    scores = scores_of(function, samples)
    if scores.of_batch:
        raise RewardError(f"math-verify {scores.faults[0].what}; mend its installation")
    for index, fault in scores.faults.items():  # of right answers: what completions do is excused, and wrong
        raise DataError(f"{flat[index][0].where}: math-verify {fault.what}; correct the row.")
    reasons = [scores.excused[i].what if i in scores.excused else "" for i in range(len(flat))]
    found = iter([(value == 1.0, reason) for value, reason in zip(scores.values, reasons, strict=True)])
    marks = []
    for of_one in saved:
        each = [next(found) for _ in of_one]
        marks.append(Marks(right=[right for right, _ in each], wrong=[wrong for _, wrong in each]))
    return marks


def mark_programs(
    questions: Sequence[Question],
    saved: Sequence[Sequence[Saved]],
    tests: ProgramTests,
    *,
    num_public: int | None = None,
    with_public: bool = False,
    partial: bool = False,
) -> list[Marks]:
    """By unit tests; with `with_public` also which programs the public tests keep, and how those behave.

    `partial` says that `tests` run on after the first that fails: without it the part that passes is not known.
    """
    problems = [read_code_problem(question.row, num_public) for question in questions]
    for question, problem in zip(questions, problems, strict=True):
        if not len(problem.whole):
            raise DataError(f"{question.where}: the problem has no tests; leave the row out.")
    # As the benchmark runs them: stop strings have ended what was drawn here, and of others every line counts.
    programs = [
        [program_of(problem.whole, one.completion, cut=False) for one in of_one]
        for problem, of_one in zip(problems, saved, strict=True)
    ]
    flat = [(i, program) for i, of_one in enumerate(programs) for program in of_one]
    verdicts = iter(tests.verdicts([(problems[i].whole, program) for i, program in flat]))
    marks = []
    for of_one in programs:
        found = [next(verdicts) for _ in of_one]
        marks.append(
            Marks(
                right=[verdict.passed for verdict in found],
                of_programs=True,
                tests_passed=[verdict.num_passed / verdict.num_tests for verdict in found] if partial else [],
                wrong=[verdict.wrong for verdict in found],
            )
        )
    if with_public:
        _add_public(marks, problems, programs, tests)
    return marks


def _add_public(
    marks: Sequence[Marks], problems: Sequence[CodeProblem], programs: Sequence[Sequence[str]], tests: ProgramTests
) -> None:
    flat = [(i, j) for i, of_one in enumerate(programs) for j in range(len(of_one))]
    verdicts = tests.verdicts([(problems[i].public, programs[i][j]) for i, j in flat])
    for (i, _), verdict in zip(flat, verdicts, strict=True):  # where no test is public, all are kept
        marks[i].kept.append(verdict.passed or not len(problems[i].public))
    for mark, problem in zip(marks, problems, strict=True):
        mark.filters = len(problem.public) > 0
    kept = [(i, j) for i, j in flat if marks[i].kept[j] and problems[i].inputs]
    work = [(problems[i].whole, programs[i][j]) for i, j in kept]
    printed = tests.outputs(work, [problems[i].inputs for i, _ in kept])
    for mark, problem, of_one in zip(marks, problems, programs, strict=True):
        mark.behaviours = [None] * len(of_one) if problem.inputs else None
    for (i, j), texts in zip(kept, printed, strict=True):
        behaviours = marks[i].behaviours
        assert behaviours is not None
        behaviours[j] = tuple("\n".join(line.split()) for line in texts)


def estimates(questions: Sequence[Question], marks: Sequence[Marks], wanted: Wanted) -> dict[str, Estimate]:
    """`accuracy` (`pass@1` of programs) and `pass@k`, both of each group too; `n@k filtered` (`unfiltered`
    where no question has public tests) and `n@k clustered`; the part of tests that pass, where that is known.

    Raises `InputError` where more samples are wanted than there are.
    """
    wanted.check(min(len(mark.right) for mark in marks))
    of_programs = any(mark.of_programs for mark in marks)
    rates = {"pass@1" if of_programs else "accuracy": [fmean(mark.right) for mark in marks]}
    for k in wanted.ks:
        if k > 1:
            rates[f"pass@{k}"] = [pass_at_k(len(mark.right), sum(mark.right), k) for mark in marks]
    found = {name: _share(values) for name, values in rates.items()}
    if wanted.n_at_ks:
        _tell_filtered(marks)
        _tell_clustered(marks)
    for n, k in wanted.n_at_ks:
        found |= _n_at_k(marks, n, k, wanted.seed)
    if all(mark.tests_passed for mark in marks):
        found["tests passed"] = _share([fmean(mark.tests_passed) for mark in marks])
    groups = [question.group for question in questions]
    for name, values in rates.items():
        found |= {f"{name} ({group})": _share(part) for group, part in by_group(groups, values).items()}
    return found


def _n_at_k(marks: Sequence[Marks], n: int, k: int, seed: int) -> dict[str, Estimate]:
    filtered = [
        filtered_n_at_k(
            len(mark.right),
            sum(mark.kept),
            sum(r for r, kept in zip(mark.right, mark.kept, strict=True) if kept),
            n=n,
            k=k,
        )
        for mark in marks
    ]
    how = "filtered" if any(mark.filters for mark in marks) else "unfiltered"
    found = {f"{n}@{k} {how}": _share(filtered)}
    clustered = [
        clustered_n_at_k(_samples(mark), n=n, k=k, seed=seed + i)
        for i, mark in enumerate(marks)
        if mark.behaviours is not None
    ]
    if clustered:
        found[f"{n}@{k} clustered" + (" unfiltered" if how == "unfiltered" else "")] = _share(clustered)
    return found


def _tell_filtered(marks: Sequence[Marks]) -> None:
    num_filtered = sum(mark.filters for mark in marks)
    if not num_filtered:
        logger.warning(
            "n@k is of samples that nothing filters: no question has public tests; say how many of the first are "
            "public by --public-tests"
        )
    elif num_filtered < len(marks):
        logger.warning(
            f"n@k filtered: only {num_filtered} of {len(marks)} questions have public tests; of the others every "
            "sample may be submitted"
        )


def _tell_clustered(marks: Sequence[Marks]) -> None:
    num_grouped = sum(mark.behaviours is not None for mark in marks)
    if 0 < num_grouped < len(marks):
        logger.warning(
            f"n@k clustered is that of {num_grouped} of {len(marks)} questions: the others have no inputs that "
            "tell programs apart; n@k without it is of all of them"
        )


def _samples(mark: Marks) -> list[Sample]:
    assert mark.behaviours is not None
    return [
        Sample(kept=kept, correct=right, behaviour=behaviour)
        for kept, right, behaviour in zip(mark.kept, mark.right, mark.behaviours, strict=True)
    ]


def _share(values: Sequence[float]) -> Estimate:
    """Without what rounding puts outside [0, 1]."""
    return share([min(1.0, max(0.0, value)) for value in values])
