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
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from meshift.rewards.sandbox.caught import Caught
from meshift.rewards.sandbox.remote import Channel
from meshift.rewards.sandbox.tester import run_tests
from meshift.rewards.sandbox.values import ValueNotPlainError, decode, encode, receive, send

Places = Mapping[str, int]  # file descriptors by name
OWN = "meshift"


def run_program(places: Places) -> int:
    """Run it as `__main__`, on stdin and stdout. The exit status, which proves nothing."""
    code = _read_text(places["code"])
    module = _main_module("__main__")
    status = 0
    with Caught() as program:
        exec(compile(code, "program.py", "exec", dont_inherit=True), module.__dict__)
    if isinstance(program.error, SystemExit):
        end = program.error.code
        status = end if isinstance(end, int) else int(end is not None)
    elif program.error is not None:
        with Caught():  # the program may have taken stderr, or all memory
            sys.stderr.write("".join(traceback.format_exception(program.error, limit=-3))[-2000:])
        status = 1
    return _finish(status & 0xFF)


def serve_functions(places: Places) -> int:
    """Load the program, and use its functions as the other process asks, until that ends."""
    hear, answer = places["hear"], places["answer"]
    module = _main_module("solution")
    objects: list[Any] = []
    with Caught() as program:
        exec(compile(_read_text(places["code"]), "program.py", "exec", dont_inherit=True), module.__dict__)
    if program.error is not None:
        send(answer, {"fatal": f"{type(program.error).__name__}: {_text(program.error)}"})
        return 1
    send(answer, {"loaded": True})
    while isinstance(question := receive(hear), dict):
        send(answer, _answer(question, module.__dict__, objects))
    return 0


def test_functions(places: Places) -> int:
    """Run the tests of a program that `serve_functions` serves."""
    sys.set_int_max_str_digits(0)
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
    sys.set_int_max_str_digits(0)  # contests ask for longer numbers; the time that these take is limited anyway
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")  # `site` was not loaded
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")
    sys.stdin = io.TextIOWrapper(
        io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8", errors="replace"
    )
    return module


def _finish(status: int) -> int:
    """Wait for threads, run what was put off to the end, and write what is still in buffers."""
    with Caught() as end:  # the program may have replaced any of these
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    return status if end.error is None else status or 1


def _answer(question: Mapping[str, Any], names: dict[str, Any], objects: list[Any]) -> dict[str, Any]:
    def refer(value: Any) -> dict[str, Any]:
        objects.append(value)
        return {"h": len(objects) - 1}

    def resolve(data: Mapping[str, Any]) -> Any:
        return objects[data["h"]] if "h" in data else _global(names, data["g"])

    answer: dict[str, Any] = {}
    with Caught() as program:
        given = [decode(data, resolve) for data in question["given"]]
        named = {key: decode(data, resolve) for key, data in question["named"].items()}
        value = _use(question["use"], resolve(question["of"]), given, named)
        answer = {"value": encode(value, refer)}
        answer |= _changes(question["given"], given, refer)
    error = program.error
    if error is None:
        return answer
    if isinstance(error, StopIteration) and question["use"] == "next":
        return {"end": True}
    name = "ValueError" if isinstance(error, ValueNotPlainError) else type(error).__name__
    return {"raised": name, "text": _text(error)}


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


def _use(name: str, of: Any, given: list[Any], named: dict[str, Any]) -> Any:
    match name:
        case "call":
            return of(*given, **named)
        case "item":
            return of[given[0]]
        case "get":
            return getattr(of, given[0])
        case "set":
            setattr(of, given[0], given[1])
            return None
    uses: dict[str, Callable[[Any], Any]] = {"len": len, "str": str, "iter": iter, "next": next}
    return uses[name](of)


def _text(error: BaseException) -> str:
    """What it says; a class of the program's own may raise here too."""
    with Caught():
        return str(error)[:200]
    return ""
