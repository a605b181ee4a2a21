"""One evaluation from the questions to the numbers: complete or read back, mark, estimate, write.

It knows no file formats of benchmarks and no command line.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from meshift.config.reward_kwargs import ChatEndpointConfig
from meshift.config.unit_tests import UnitTestsConfig
from meshift.errors import InputError
from meshift.evaluation.comparing import Pairs, duels, read_verdict
from meshift.evaluation.completions import distinct_n
from meshift.evaluation.dialogues import (
    check_dialogues,
    cost_estimates,
    judge_estimates,
    opponents,
    reward_estimates,
    scores_of_all,
)
from meshift.evaluation.drawn_folder import DrawnFolder, check_drawn, drawing_beside
from meshift.evaluation.estimators import Estimate, mean, mean_count, share
from meshift.evaluation.generating import Drawer, Drawing, weights_of
from meshift.evaluation.marking import Marks, Wanted, estimates, mark_answers, mark_programs, maths_function
from meshift.evaluation.programs import ProgramTests, SandboxedTests
from meshift.evaluation.progress import Progress
from meshift.evaluation.reading import ScoreModel, ScoreReader, kl_to_reference
from meshift.evaluation.remarks import template_remark, unverified_remark, zero_remarks
from meshift.evaluation.results import Results
from meshift.evaluation.saved import Saved, read_completions
from meshift.evaluation.tasks import Question, Task
from meshift.rewards.chat_endpoint import ChatEndpoint
from meshift.rewards.rating import as_text
from meshift.runtime.models import check_same_tokenizer, open_tokenizer


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A judge, and what it is asked."""

    endpoint: ChatEndpointConfig
    question: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be evaluated by what. `drawing` says how completions are drawn, or how those of a file were."""

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

    @property
    def is_verified(self) -> bool:
        """Whether it is known that `model` draws, or drew: `check_request` has looked at the file's own word."""
        return self.completions is None or drawing_beside(Path(self.completions)) is not None


def check_request(request: Request, questions: Sequence[Question]) -> list[str]:
    """Raise for whatever cannot score completions, before any is drawn: packages, layers, models, files, keys.

    Gives what should be known by then, in sentences.
    """
    if request.completions is None:
        request.wanted.check(request.drawing.num_samples)
    if request.task.name == "math":
        maths_function()
    notes: list[str] = []
    if request.task.kind == "code":
        sandbox = SandboxedTests(request.tests)
        sandbox.close()
        notes += sandbox.notes
    notes += [note for reader in _readers(request) for note in reader.check(questions)]
    if request.completions is not None and request.model is not None and request.is_verified:
        check_drawn(Path(request.completions), request.model, weights_of(request.model))
    if request.reference is not None and request.model is not None:
        check_same_tokenizer({"actor": request.model, "reference": request.reference})
    rivals = opponents(questions, _against(request, questions))
    check_dialogues(questions, rivals, judged=request.judge is not None)
    if request.judge is not None:
        ChatEndpoint(request.judge.endpoint, read_verdict)
    return [*_of_model(request), *notes]


def _readers(request: Request) -> list[ScoreReader]:
    """Of the reward and the cost model, those that are asked for."""
    named = ((request.reward_model, "reward"), (request.cost_model, "cost"))
    chat, policy = request.drawing.chat, request.model
    return [ScoreReader(name, role, chat=chat, policy=policy) for name, role in named if name is not None]


def _of_model(request: Request) -> list[str]:
    if request.model is None:
        return []
    if request.completions is None:
        has_template = bool(open_tokenizer(request.model).chat_template)
        return template_remark(request.model, has_template, chat=request.drawing.chat)
    return [] if request.is_verified else [unverified_remark(request.model, request.completions)]


def complete(
    request: Request, questions: Sequence[Question], folder: Path, on_progress: Progress | None = None
) -> list[list[Saved]]:
    """The completions of every question: read from the request's file, or drawn into the folder.

    What the folder has of them already is not drawn again. Raises `InputError` where that was drawn otherwise.
    """
    if request.completions is not None:
        return read_completions(request.completions, questions, all_questions=request.limit is None)
    if request.model is None:
        raise InputError("neither a model nor completions are given; give one of them")
    num_samples = request.drawing.num_samples
    drawer = Drawer(request.model, request.task, request.drawing)
    prompts = drawer.prompts(questions)
    kept = DrawnFolder(folder, {"task": request.task.name, **drawer.settings()})
    wanted = kept.missing(questions, prompts, num_samples)
    total = len(questions) * num_samples
    before, start = kept.num_kept, total - len(wanted)

    def tell(num_steps: int, steps_left: float) -> None:
        if on_progress is not None:
            work = (num_steps, steps_left)
            on_progress("completions", start + kept.num_kept - before, total, work=work)

    if on_progress is not None:
        on_progress("completions", start, total)
    drawer.draw(questions, prompts, wanted, kept.add, tell)
    return kept.finish(questions, num_samples)


def evaluate(
    request: Request,
    questions: Sequence[Question],
    saved: Sequence[Sequence[Saved]],
    tests: ProgramTests | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """All that the request asks of these completions. `tests` may replace the sandbox, where programs are run."""
    started = time.monotonic()
    rows = [[{"id": one.id, "sample": one.sample} for one in of_one] for of_one in saved]
    metrics: dict[str, Estimate] = {}
    notes: list[str] = []
    if request.task.kind != "dialogue":
        marks = _marks(request, questions, saved, tests, on_progress)
        metrics |= estimates(questions, marks, request.wanted)
        _tell_marks(rows, marks)
        notes = zero_remarks(request.task, saved, marks, chat=request.drawing.chat)
    metrics |= _dialogue_metrics(request, questions, saved, rows, on_progress)
    if request.reference is not None:
        metrics |= _kl(request, saved, rows, on_progress)
    metrics |= _texts(saved)
    flat = [row for of_one in rows for row in of_one]
    return Results(
        metrics=metrics,
        rows=flat,
        num_questions=len(questions),
        num_samples=len(flat),
        seconds=time.monotonic() - started,
        notes=notes,
    )


def _marks(
    request: Request,
    questions: Sequence[Question],
    saved: Sequence[Sequence[Saved]],
    tests: ProgramTests | None,
    on_progress: Progress | None,
) -> list[Marks]:
    request.wanted.check(min(map(len, saved)))
    if request.task.kind == "answer":
        return mark_answers(request.task, questions, saved)
    if tests is None:
        sandbox = SandboxedTests(request.tests, on_progress)
        try:
            return _marks(request, questions, saved, sandbox, on_progress)
        finally:
            sandbox.close()
    return mark_programs(
        questions,
        saved,
        tests,
        num_public=request.num_public,
        with_public=bool(request.wanted.n_at_ks),
        partial=request.tests.credit == "partial",
    )


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
    on_progress: Progress | None,
) -> dict[str, Estimate]:
    against = _against(request, questions)
    rivals = opponents(questions, against)
    found: dict[str, Estimate] = {}
    for reader in _readers(request):
        model = ScoreModel(reader, request.drawing.dtype, on_progress)
        scores = scores_of_all(model, questions, saved)
        _tell(rows, reader.role, scores)
        if reader.role == "reward":
            found |= reward_estimates(model, questions, scores, rivals)
        else:
            found |= cost_estimates(model, questions, scores, rivals)
    if request.judge is not None and rivals is not None:
        prompts = [as_text(question.prompt) for question in questions]
        ours = [of_one[0].completion for of_one in saved]
        theirs = [as_text(said) for said in rivals.said]
        pairs = Pairs(prompts=prompts, ours=ours, theirs=theirs)
        said = duels(request.judge.endpoint, pairs, request.judge.question, on_progress)
        for of_one, duel in zip(rows, said, strict=True):
            of_one[0] |= {"judge": duel.score, "judge_wrong": duel.wrong}
        found |= judge_estimates(said, rivals.name)
    return found


def _against(request: Request, questions: Sequence[Question]) -> list[list[Saved]] | None:
    if request.against is None:
        return None
    return read_completions(request.against, questions, all_questions=request.limit is None)


def _tell(rows: Sequence[Sequence[dict[str, Any]]], name: str, values: Sequence[Sequence[float]]) -> None:
    for of_one, numbers in zip(rows, values, strict=True):
        for row, number in zip(of_one, numbers, strict=True):
            row[name] = number


def _kl(
    request: Request,
    saved: Sequence[Sequence[Saved]],
    rows: Sequence[Sequence[dict[str, Any]]],
    on_progress: Progress | None,
) -> dict[str, Estimate]:
    if request.model is None or request.reference is None:
        raise InputError("KL is that of a model to a reference; give --model with --reference")
    flat = [one for of_one in saved for one in of_one]
    values = iter(
        kl_to_reference(
            request.model,
            request.reference,
            flat,
            temperature=request.drawing.params.temperature,
            dtype=request.drawing.dtype,
            on_progress=on_progress,
        )
    )
    kl = [[next(values) for _ in of_one] for of_one in saved]
    _tell(rows, "kl", kl)
    return {"KL to reference": mean([fmean(of_one) for of_one in kl])}


def _texts(saved: Sequence[Sequence[Saved]]) -> dict[str, Estimate]:
    """What the texts themselves show, whatever they are worth."""
    found = {"truncated": share([fmean(one.truncated for one in of_one) for of_one in saved])}
    if all(one.completion_ids for of_one in saved for one in of_one):
        found["tokens"] = mean_count([fmean(len(one.completion_ids) for one in of_one) for of_one in saved])
    texts = [one.completion for of_one in saved for one in of_one]
    distinct = distinct_n(texts, 2)
    return found | {"distinct 2-grams": Estimate(value=distinct, low=None, high=None, num=len(saved))}
