"""What a child of the server runs once it is shut in: a whole program, a program whose functions are called from
outside, or the tests of one.

It knows nothing of the layers, and judges nothing.
"""

from __future__ import annotations

import _sitebuiltins
import atexit
import builtins
import io
import json
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from meshift.rewards.sandbox.remote import Channel
from meshift.rewards.sandbox.tester import run_tests
from meshift.rewards.sandbox.values import ValueNotPlainError, decode, encode, receive, send

Places = Mapping[str, int]  # file descriptors by name
OWN = "meshift"


def run_program(places: Places) -> int:
    """Run it as `__main__`, on stdin and stdout. The exit status, which proves nothing."""
    code = _read_text(places["code"])
    module = _main_module("__main__")
    try:
        exec(compile(code, "program.py", "exec"), module.__dict__)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - it is the program's; its end is told by the status
        _tell_error()
        status = 1
    return _finish(status & 0xFF)


def serve_functions(places: Places) -> int:
    """Load the program, and use its functions as the other process asks, until that ends."""
    hear, answer = places["hear"], places["answer"]
    module = _main_module("solution")
    objects: list[Any] = []
    try:
        exec(compile(_read_text(places["code"]), "program.py", "exec"), module.__dict__)
    except BaseException as error:  # noqa: BLE001 - it is the program's, and the other side is told of it
        send(answer, {"fatal": f"{type(error).__name__}: {_text(error)}"})
        return 1
    send(answer, {"loaded": True})
    while isinstance(question := receive(hear), dict):
        send(answer, _answer(question, module.__dict__, objects))
    return 0


def test_functions(places: Places) -> int:
    """Run the tests of a program that `serve_functions` serves."""
    work = json.loads(_read_text(places["tests"]))
    run_tests(work, places["verdicts"], Channel(places["ask"], places["hear"]))
    return 0


KINDS: dict[str, Callable[[Places], int]] = {
    "program": run_program,
    "functions": serve_functions,
    "tests": test_functions,
}


def _read_text(place: int) -> str:
    with open(place, "rb") as file:
        file.seek(0)  # a program's next test reads the same open file
        return file.read().decode("utf-8", errors="replace")


def _main_module(name: str) -> types.ModuleType:
    """A module like that of a script, in an interpreter that looks like a fresh one."""
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = builtins
    for loaded in [m for m in sys.modules if m == OWN or m.startswith(OWN + ".")]:
        del sys.modules[loaded]
    sys.modules[name] = module
    sys.argv[:] = ["program.py"]
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")  # type: ignore[assignment]  # `site` was not loaded
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")  # type: ignore[assignment]
    sys.stdin = io.TextIOWrapper(open(0, "rb", closefd=False), encoding="utf-8", errors="replace")
    return module


def _tell_error() -> None:
    try:
        sys.stderr.write(traceback.format_exc(limit=-3)[-2000:])
    except (OSError, ValueError, RecursionError, MemoryError):
        return


def _finish(status: int) -> int:
    """Wait for threads, run what was put off to the end, and write what is still in buffers."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - the program may have replaced any of these
        return status or 1
    return status


def _answer(question: Mapping[str, Any], names: dict[str, Any], objects: list[Any]) -> dict[str, Any]:
    def refer(value: Any) -> dict[str, Any]:
        objects.append(value)
        return {"h": len(objects) - 1}

    def resolve(data: Mapping[str, Any]) -> Any:
        return objects[data["h"]] if "h" in data else _global(names, data["g"])

    try:
        given = [decode(data, resolve) for data in question["given"]]
        named = {key: decode(data, resolve) for key, data in question["named"].items()}
        value = USES[question["use"]](resolve(question["of"]), *given, **named)
        answer = {"value": encode(value, refer)}
        return answer | _changes(question["given"], given, refer)
    except StopIteration:
        return {"end": True} if question["use"] == "next" else {"raised": "StopIteration"}
    except ValueNotPlainError as error:
        return {"raised": "ValueError", "text": str(error)}
    except BaseException as error:  # noqa: BLE001 - it is the program's, and the other side is told of it
        return {"raised": type(error).__name__, "text": _text(error)}


def _global(names: Mapping[str, Any], name: str) -> Any:
    if name not in names:
        raise NameError(f"name {name!r} is not defined")
    return names[name]


def _changes(before: list[Any], given: list[Any], refer: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The lists, dicts and sets among the arguments that the function has changed."""
    after = [encode(v, refer) if isinstance(v, list | dict | set) else None for v in given]
    if all(new is None or new == old for old, new in zip(before, after, strict=True)):
        return {}
    return {"changed": after}


USES: dict[str, Callable[..., Any]] = {
    "call": lambda of, *given, **named: of(*given, **named),
    "get": getattr,
    "set": setattr,
    "item": lambda of, key: of[key],
    "len": len,
    "str": str,
    "iter": iter,
    "next": next,
}


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:  # noqa: BLE001 - a class of the program's own may raise here too
        return ""
