"""One evaluation from the questions to the numbers: complete or read back, mark, estimate, write.

It knows no file formats of benchmarks and no command line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from meshift.config.reward_kwargs import ChatEndpointConfig
from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import InputError, SaveError
from meshift.evaluation.comparing import duels
from meshift.evaluation.completions import distinct_n
from meshift.evaluation.dialogues import (
    check_dialogues,
    cost_estimates,
    judge_estimates,
    opponents,
    reward_estimates,
    scores_of_all,
)
from meshift.evaluation.estimators import Estimate, mean, share
from meshift.evaluation.generating import Drawing, generate
from meshift.evaluation.marking import Marks, Wanted, estimates, mark_answers, mark_programs
from meshift.evaluation.programs import ProgramTests, SandboxedTests
from meshift.evaluation.reading import ScoreModel, kl_to_reference
from meshift.evaluation.saved import Saved, read_completions, write_completions, write_lines
from meshift.evaluation.tasks import Question, Task
from meshift.rewards.rating import as_text

COMPLETIONS, SCORES, RESULTS = "completions.jsonl", "scores.jsonl", "results.json"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A judge, what it is asked, and whose completions (a file) ours are held against."""

    endpoint: ChatEndpointConfig
    question: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated by what. `drawing` is None where `completions` are given and no model reads them."""

    task: Task
    data: str
    drawing: Drawing
    wanted: Wanted
    model: str | None = None
    completions: str | None = None
    limit: int | None = None
    tests: UnitTestsConfig = field(default_factory=UnitTestsConfig)
    num_public: int | None = None
    reward_model: str | None = None
    cost_model: str | None = None
    reference: str | None = None
    against: str | None = None
    judge: Judged | None = None


@dataclass(frozen=True, kw_only=True)
class Results:
    """Estimates by name, and of every completion what it got, in the order of the questions."""

    metrics: Mapping[str, Estimate]
    rows: Sequence[Mapping[str, Any]]
    num_questions: int
    num_samples: int
    seconds: float


def complete(
    request: Request, questions: Sequence[Question], on_progress: Callable[[int, int], None] | None = None
) -> list[list[Saved]]:
    """The completions of every question: read from the file, or drawn."""
    if request.completions is not None:
        return read_completions(request.completions, questions)
    if request.model is None:
        raise InputError("neither a model nor completions are given; give one of them")
    return generate(request.model, request.task, questions, request.drawing, on_progress)


def evaluate(
    request: Request,
    questions: Sequence[Question],
    saved: Sequence[Sequence[Saved]],
    tests: ProgramTests | None = None,
) -> Results:
    """All that the request asks of these completions. `tests` may replace the sandbox, where programs are run."""
    started = time.monotonic()
    rows = [[{"id": one.id, "sample": one.sample} for one in of_one] for of_one in saved]
    metrics: dict[str, Estimate] = {}
    if request.task.kind != "dialogue":
        marks = _marks(request, questions, saved, tests)
        metrics |= estimates(questions, marks, request.wanted)
        _tell_marks(rows, marks)
    metrics |= _dialogue_metrics(request, questions, saved, rows)
    if request.reference is not None:
        metrics |= _kl(request, saved, rows)
    metrics |= _texts(saved)
    flat = [row for of_one in rows for row in of_one]
    return Results(
        metrics=metrics,
        rows=flat,
        num_questions=len(questions),
        num_samples=len(flat),
        seconds=time.monotonic() - started,
    )


def _marks(
    request: Request,
    questions: Sequence[Question],
    saved: Sequence[Sequence[Saved]],
    tests: ProgramTests | None,
) -> list[Marks]:
    request.wanted.check(min(map(len, saved)))
    if request.task.kind == "answer":
        return mark_answers(request.task, questions, saved)
    with_public = bool(request.wanted.n_at_ks)
    if tests is not None:
        return mark_programs(questions, saved, tests, num_public=request.num_public, with_public=with_public)
    sandbox = SandboxedTests(request.tests)
    try:
        return mark_programs(questions, saved, sandbox, num_public=request.num_public, with_public=with_public)
    finally:
        sandbox.close()


def _tell_marks(rows: Sequence[Sequence[dict[str, Any]]], marks: Sequence[Marks]) -> None:
    for of_one, mark in zip(rows, marks, strict=True):
        for j, row in enumerate(of_one):
            row["right"] = mark.right[j]
            for name, values in (
                ("tests_passed", mark.tests_passed),
                ("public", mark.kept),
                ("wrong", mark.wrong),
            ):
                if values:
                    row[name] = values[j]


def _dialogue_metrics(
    request: Request,
    questions: Sequence[Question],
    saved: Sequence[Sequence[Saved]],
    rows: Sequence[Sequence[dict[str, Any]]],
) -> dict[str, Estimate]:
    against = None if request.against is None else read_completions(request.against, questions)
    rivals = opponents(questions, against)
    check_dialogues(questions, rivals, judged=request.judge is not None)
    found: dict[str, Estimate] = {}
    for name, role in ((request.reward_model, "reward"), (request.cost_model, "cost")):
        if name is None:
            continue
        model = ScoreModel(name, role, request.drawing.dtype, chat=request.drawing.chat)
        scores = scores_of_all(model, questions, saved)
        _tell(rows, role, scores)
        if role == "reward":
            found |= reward_estimates(model, questions, scores, rivals)
        else:
            found |= cost_estimates(model, questions, scores)
    if request.judge is not None and rivals is not None:
        prompts = [as_text(question.prompt) for question in questions]
        ours = [of_one[0].completion for of_one in saved]
        theirs = [as_text(said) for said in rivals.said]
        said = duels(request.judge.endpoint, prompts, ours, theirs, request.judge.question)
        for of_one, duel in zip(rows, said, strict=True):
            of_one[0] |= {"judge": duel.score, "judge_wrong": duel.wrong}
        found |= judge_estimates(said, rivals.name)
    return found


def _tell(rows: Sequence[Sequence[dict[str, Any]]], name: str, values: Sequence[Sequence[float]]) -> None:
    for of_one, numbers in zip(rows, values, strict=True):
        for row, number in zip(of_one, numbers, strict=True):
            row[name] = number


def _kl(
    request: Request, saved: Sequence[Sequence[Saved]], rows: Sequence[Sequence[dict[str, Any]]]
) -> dict[str, Estimate]:
    if request.model is None or request.reference is None:
        raise InputError("KL is that of a model to a reference; give --model with --reference")
    flat = [one for of_one in saved for one in of_one]
    temperature = request.drawing.params.temperature
    values = iter(kl_to_reference(request.model, request.reference, flat, temperature, request.drawing.dtype))
    kl = [[next(values) for _ in of_one] for of_one in saved]
    _tell(rows, "kl", kl)
    return {"KL to reference": mean([fmean(of_one) for of_one in kl])}


def _texts(saved: Sequence[Sequence[Saved]]) -> dict[str, Estimate]:
    """What the texts themselves show, whatever they are worth."""
    found = {"truncated": share([fmean(one.truncated for one in of_one) for of_one in saved])}
    if all(one.completion_ids for of_one in saved for one in of_one):
        found["tokens"] = mean([fmean(len(one.completion_ids) for one in of_one) for of_one in saved])
    texts = [one.completion for of_one in saved for one in of_one]
    distinct = distinct_n(texts, 2)
    return found | {"distinct 2-grams": Estimate(value=distinct, low=None, high=None, num=len(saved))}


def make_folder(folder: Path) -> None:
    """Where results go. Raises `InputError` where completions lie there already: they cost time to draw."""
    if (folder / COMPLETIONS).exists():
        raise InputError(
            f"{folder} holds completions already; score these with --completions {folder / COMPLETIONS}, or name "
            "another --output"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be made ({error.strerror}); name another folder") from None


def write_results(folder: Path, request: Request, results: Results, settings: Mapping[str, Any]) -> Path:
    """`results.json` and `scores.jsonl`; gives the first. Raises `SaveError`."""
    write_lines(folder / SCORES, results.rows)
    content = {
        "task": request.task.name,
        "data": request.data,
        "model": request.model,
        "num_questions": results.num_questions,
        "num_completions": results.num_samples,
        "metrics": {name: estimate.to_json() for name, estimate in results.metrics.items()},
        "confidence": 0.95,
        "seconds": round(results.seconds, 3),
        "settings": dict(settings),
    }
    path = folder / RESULTS
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise SaveError(f"{path} cannot be written ({error.strerror}); make room, or name another") from error
    return path


def save_completions(folder: Path, saved: Sequence[Sequence[Saved]]) -> Path:
    """All completions, a line each. Raises `SaveError`."""
    write_completions(folder / COMPLETIONS, [one for of_one in saved for one in of_one])
    return folder / COMPLETIONS
