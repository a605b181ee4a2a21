"""Programming problems as their data sets have them: rows of APPS, CodeContests, HumanEval, MBPP, or plain
`tests`.

A row becomes inputs with outputs, or tests of functions. It knows nothing of how they are run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "CodeContests": ("public_tests", "private_tests", "generated_tests"),
    "APPS": ("input_output",),
    "HumanEval": ("test", "entry_point"),
    "MBPP": ("test_list",),
    "tests": ("tests",),
    "verl": ("ground_truth",),
    "verl rows": ("reward_model",),
}
"""By form: its columns, of which CodeContests needs one and the others all. The first form that a row has is
taken."""


APPS_IMPORTS: Mapping[str, tuple[str, ...]] = {
    "collections": ("ChainMap", "Counter", "OrderedDict", "defaultdict", "deque"),
    "fractions": (),
    "functools": ("lru_cache",),
    "heapq": ("heapify", "heappop", "heappush", "heappushpop", "heapreplace", "merge", "nlargest", "nsmallest"),
    "itertools": ("accumulate", "combinations", "permutations", "product"),
    "math": ("ceil", "cos", "exp", "fabs", "floor", "gcd", "log", "log2", "sin", "sqrt", "tan"),
    "random": (),
    "sys": (),
    "time": (),
    "typing": ("List", "Tuple"),
}
"""Modules, and names of them, that APPS's own tests give programs, and numpy: `starter_code` has `List[int]`."""
DEFINED = re.compile(r"^(?:def|class) (\w+)", re.MULTILINE)


class ProblemError(Exception):
    """A row whose tests cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Tests of one problem: either `inputs` (stdin, expected stdout) or `tests` of functions.

    A test of functions is `{"code": "assert f(1) == 2"}` or `{"call": "f", "given": [1], "expected": 2}`, where
    `"method_of": "Solution"` means the method f of a new object of that class, if the program has one. `setup`
    is code that the tests run after; names in `remote` are always the program's. `opening` is what a completion
    goes on with, `entry_point` the function that it is to define, `imports` the modules, and names of them, that
    every program is given. `contest`: outputs are compared as CodeContests does. Limits are None where the data
    has none.
    """

    inputs: Sequence[tuple[str, str]] = ()
    tests: Sequence[Mapping[str, Any]] = ()
    setup: str = ""
    remote: Sequence[str] = ()
    opening: str = ""
    entry_point: str = ""
    imports: Mapping[str, Sequence[str]] = field(default_factory=dict)
    contest: bool = False
    time_limit_s: float | None = None
    memory_limit_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.inputs) or len(self.tests)


def form_of(columns: Sequence[str]) -> str | None:
    """Which form data with these columns has."""
    for form, needed in COLUMNS.items():
        quantifier = any if form == "CodeContests" else all
        if quantifier(name in columns for name in needed):
            return form
    return None


def read_problem(row: Mapping[str, Any], prompt: Any, max_tests: int | None = None) -> Problem:
    """The problem of a row with its prompt (a text, or messages). Raises `ProblemError` saying what cannot be
    read."""
    form = form_of([name for name, value in row.items() if value is not None])
    if form is None and form_of(list(row)) is not None:
        return Problem()  # null is how data of several kinds says that a row has none
    if form is None:
        raise ProblemError(f"the row has tests in none of the known columns ({', '.join(sorted(row)) or 'none'})")
    try:
        problem = READERS[form](row, prompt)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ProblemError(
            f"tests in the form of {form} cannot be read ({type(error).__name__}: {error})"
        ) from None
    return problem if max_tests is None else _first(problem, max_tests)


def _first(problem: Problem, count: int) -> Problem:
    return replace(problem, inputs=problem.inputs[:count], tests=problem.tests[:count])


def _code_contests(row: Mapping[str, Any], prompt: Any) -> Problem:
    inputs: list[tuple[str, str]] = []
    for name in COLUMNS["CodeContests"]:
        tests = row.get(name) or {}
        if isinstance(tests, Mapping):
            inputs += zip(tests.get("input", ()), tests.get("output", ()), strict=True)
        else:  # a list of pairs, as in the data set's own protocol buffers
            inputs += [(test["input"], test["output"]) for test in tests]
    return Problem(
        inputs=inputs,
        contest=True,
        time_limit_s=_seconds(row.get("time_limit")),
        memory_limit_bytes=row.get("memory_limit_bytes") or None,
    )


def _seconds(limit: Any) -> float | None:
    if isinstance(limit, Mapping):
        return (limit.get("seconds") or 0) + (limit.get("nanos") or 0) / 1e9 or None
    return float(limit) if limit else None


def _apps(row: Mapping[str, Any], prompt: Any) -> Problem:
    return _input_output(row["input_output"])


def _verl(row: Mapping[str, Any], prompt: Any) -> Problem:
    return _input_output(row["ground_truth"])


def _verl_rows(row: Mapping[str, Any], prompt: Any) -> Problem:
    return _input_output(row["reward_model"]["ground_truth"])


def _input_output(text: Any) -> Problem:
    """`{"inputs": [...], "outputs": [...]}`, with `fn_name` where a function is called: a method of the class
    `Solution` in programs that have it, whatever the problem's own `starter_code` begins with."""
    is_json = isinstance(text, str) and text.strip()
    tests = json.loads(text, parse_int=_any_integer) if is_json else text or {}
    inputs, outputs, name = tests.get("inputs", ()), tests.get("outputs", ()), tests.get("fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs, {len(outputs)} outputs")
    if not name:
        pairs = [(_as_text(given), _as_text(output)) for given, output in zip(inputs, outputs, strict=True)]
        return Problem(inputs=pairs, imports=APPS_IMPORTS)
    calls = [
        {
            "call": str(name),
            "method_of": "Solution",
            "given": _with_number_keys(list(given)),
            "expected": _with_number_keys(output),
        }
        for given, output in zip(inputs, outputs, strict=True)
    ]
    return Problem(tests=calls, entry_point=str(name), imports=APPS_IMPORTS)


def _any_integer(digits: str) -> int:
    """Of any length: Python reads 4300 digits at most in a text, and APPS has more."""
    return int(Decimal(digits))


def _as_text(value: Any) -> str:
    """Inputs and outputs are texts, or lists of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _with_number_keys(value: Any) -> Any:
    """JSON has text keys alone; where all of a dictionary's are numbers, the problem's own were numbers."""
    if isinstance(value, list):
        return [_with_number_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    is_number = bool(value) and all(key.lstrip("-").isdecimal() for key in value)
    return {int(k) if is_number else k: _with_number_keys(v) for k, v in value.items()}


def _human_eval(row: Mapping[str, Any], prompt: Any) -> Problem:
    """`check(candidate)` is one test. The prompt's own helpers are run where the tests are: the program cannot
    change what they compute."""
    name = str(row["entry_point"])
    opening = _opening(row, prompt)
    return Problem(
        tests=[{"code": f"{row['test']}\ncheck({name})"}],
        setup=opening,
        remote=[name],
        opening=opening,
        entry_point=name,
    )


def _opening(row: Mapping[str, Any], prompt: Any) -> str:
    """The head of the function `entry_point`: a column of its own, or the prompt where that has it."""
    name = row.get("entry_point")
    given = row.get("opening") or (prompt if isinstance(prompt, str) and f"def {name}" in prompt else "")
    return str(given) if name else ""


def _mbpp(row: Mapping[str, Any], prompt: Any) -> Problem:
    imports = row.get("test_imports") or []
    setup = "\n".join([*imports, row.get("test_setup_code") or ""]).strip()
    tests = [{"code": str(test)} for test in row["test_list"]]
    named = DEFINED.findall(
        str(row.get("code") or "")
    )  # in the solution that comes with it: some are Python's own
    return Problem(tests=tests, setup=setup, remote=named)


def _plain(row: Mapping[str, Any], prompt: Any) -> Problem:
    """A list of asserts, or of `{"input": ..., "output": ...}`; asserts may be of a function to be completed."""
    tests = json.loads(row["tests"]) if isinstance(row["tests"], str) else row["tests"]
    if all(isinstance(test, str) for test in tests):
        opening, name = _opening(row, prompt), str(row.get("entry_point") or "")
        return Problem(
            tests=[{"code": test} for test in tests],
            setup=opening,
            remote=[name] if name else [],
            opening=opening,
            entry_point=name,
        )
    return Problem(inputs=[(str(test["input"]), str(test["output"])) for test in tests])


READERS = {
    "CodeContests": _code_contests,
    "APPS": _apps,
    "HumanEval": _human_eval,
    "MBPP": _mbpp,
    "tests": _plain,
    "verl": _verl,
    "verl rows": _verl_rows,
}
