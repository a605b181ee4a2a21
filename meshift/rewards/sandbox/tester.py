"""The process that tests: it runs a problem's tests on functions that live in another process, and writes
verdicts.

No line of the program that is tested runs here; what comes from it is plain data. It knows nothing of layers.
"""

from __future__ import annotations

import builtins
import importlib
import json
import os
import signal
import symtable
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from meshift.rewards.sandbox.caught import Caught
from meshift.rewards.sandbox.comparing import same_value
from meshift.rewards.sandbox.remote import Channel, Remote, SolutionEndedError
from meshift.rewards.sandbox.values import decode

Namespace = dict[str, Any]
TOO_LONG = "took too long"


class TestTimeError(BaseException):
    """A test took too long. Not an `Exception`, so that tests do not take it for one of the function."""


def run_tests(work: Mapping[str, Any], verdicts: int, channel: Channel) -> None:
    """Write `{"loaded": true}` and one JSON line per test: `{"test": index, "passed": ..., "detail": ...}`.

    `work` has `setup` (code), `remote` (names that are always the program's), `limit_s`, and `tests`: of each
    `code`, or `call` (a name) with `given` and `expected`, and `method_of` where that may be of a class. It ends
    early where the program has to be started anew; a program that does not load gives one line, with `fatal`.
    """
    signal.signal(signal.SIGALRM, _too_late)
    limit_s = float(work["limit_s"])
    namespace: Namespace = {}
    number = -1
    try:
        with_limit(limit_s)
        loaded = channel.hear()
        if "fatal" in loaded:
            _write(verdicts, {"fatal": str(loaded["fatal"])[:300]})
            return
        _write(verdicts, {"loaded": True})
        namespace = _prepare(work, channel)
        for test in work["tests"]:
            number = test["test"]
            with_limit(limit_s)
            failed = _failure(test, namespace, channel)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _write(verdicts, {"test": number, "passed": failed is None, "detail": failed or ""})
            if not channel.is_open:
                return
    except TestTimeError:
        signal.setitimer(signal.ITIMER_REAL, 0)
        late = {"fatal": TOO_LONG} if number < 0 else {"test": number, "passed": False, "detail": TOO_LONG}
        _write(verdicts, late)
    except SolutionEndedError as error:
        _write(verdicts, {"fatal": str(error)})


def with_limit(seconds: float) -> None:
    """Start the clock anew. It strikes again and again, since a test may catch what it raises."""
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.2)


def _too_late(number: int, frame: types.FrameType | None) -> None:
    raise TestTimeError


def _prepare(work: Mapping[str, Any], channel: Channel) -> Namespace:
    """What the tests' code finds: the setup's names, modules, and for all others the program's."""
    namespace: Namespace = {"__name__": "tests"}
    setup = _compiled(work["setup"])
    codes = [work["setup"] if setup else "", *(test.get("code", "") for test in work["tests"])]
    code = "\n".join(codes)
    for name in _free_names(code):
        module = name in sys.stdlib_module_names and f"{name}." in code
        namespace[name] = importlib.import_module(name) if module else Remote(channel, {"g": name})
    if setup:
        exec(setup, namespace)  # of the data's author; see the module's docstring
    for name in work["remote"]:
        namespace[name] = Remote(channel, {"g": name})
    return namespace


def _compiled(code: str) -> types.CodeType | None:
    """None for a setup that is no program by itself."""
    try:
        return compile(code, "setup", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None


def _free_names(code: str) -> list[str]:
    """Names that the code reads, gives no value to anywhere on its top level, and Python does not have."""
    try:
        top = symtable.symtable(code, "tests", "exec")
    except (SyntaxError, ValueError):
        return []
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    read = {name for name in _global_reads(top) if name not in bound}
    return sorted(name for name in read if not hasattr(builtins, name))


def _global_reads(table: symtable.SymbolTable) -> Iterator[str]:
    is_top = table.get_type() == "module"
    for symbol in table.get_symbols():
        if symbol.is_referenced() and (is_top or symbol.is_global()):
            yield symbol.get_name()
    for child in table.get_children():
        yield from _global_reads(child)


def _failure(test: Mapping[str, Any], namespace: Namespace, channel: Channel) -> str | None:
    """None where the test passes, else why not."""
    with Caught() as run:
        if "call" in test:
            given, expected = (decode(test[name], dict) for name in ("given", "expected"))
            value = _called(test["call"], test.get("method_of"), channel)(*given)
            return None if same_value(value, expected) else f"gave {value!r:.80}"
        exec(compile(test["code"], "test", "exec", dont_inherit=True), namespace)
    if isinstance(run.error, TestTimeError):
        raise run.error
    if run.error is not None:
        return f"{type(run.error).__name__}: {run.error!s:.200}"
    # A test may have taken the end of the program for an exception that it expects.
    return None if channel.is_open else "the program ended"


def _called(name: str, method_of: str | None, channel: Channel) -> Any:
    """The method `name` of a new object where the program has such a class with it, else the function."""
    if method_of is not None:
        owner = Remote(channel, {"g": method_of})
        try:
            getattr(owner, name)
        except (NameError, AttributeError):
            pass
        else:
            return getattr(owner(), name)
    return Remote(channel, {"g": name})


def _write(verdicts: int, line: Mapping[str, Any]) -> None:
    os.write(verdicts, (json.dumps(line) + "\n").encode())
