"""The far side of a contestant: answers JSON lines on stdin with JSON lines on stdout, one after another.

It needs the standard library alone, since every peer runs it in an environment of its own. What libraries print
goes to stderr: the real stdout is taken away from them first.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol, TextIO

Reply = dict[str, Any]


class Server(Protocol):
    """What answers requests: `start`, and `round` where it works in rounds; each has keyword arguments."""

    @property
    def start(self) -> Callable[..., Reply]:
        """Load models and data; says in what precision and settings it works."""


class Wire:
    """The real stdout, kept for replies; whoever prints writes to stderr from now on."""

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def requests(self) -> Any:
        """The requests, one JSON object a line, until stdin ends."""
        for line in iter(sys.stdin.readline, ""):
            yield json.loads(line)

    def reply(self, reply: Mapping[str, Any]) -> None:
        """Send one answer."""
        self._out.write(json.dumps(reply) + "\n")
        self._out.flush()


def serve(server: Server, packages: Sequence[str] = ()) -> None:
    """Answer until stdin ends. A round's reply has its `seconds`, unless the server has timed it itself."""
    wire = Wire()
    for request in wire.requests():
        wire.reply(answer(server, request, packages))


def answer(server: Server, request: Mapping[str, Any], packages: Sequence[str] = ()) -> Reply:
    """The reply to one request: what the server says, or `error` with the exception as one line."""
    options = dict(request)
    verb = options.pop("verb")
    try:
        started = time.perf_counter()
        reply = {"seconds": 0.0, **getattr(server, verb)(**options)}
        settle()
        reply["seconds"] = reply["seconds"] or time.perf_counter() - started
    except Exception as error:  # noqa: BLE001 - each peer fails in ways of its own, and all are answers
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    if verb == "start":
        reply["versions"] = {name: metadata.version(name) for name in packages}
    return reply | device_memory()


def settle() -> None:
    """Wait for an accelerator to finish what it was given, so that a time is the work's and not its launch's."""
    if cuda := _cuda():
        cuda.synchronize()


def device_memory() -> Reply:
    """`device_memory_gb`: the accelerator's peak of torch's allocations, in 1e9 bytes; nothing on a CPU."""
    cuda = _cuda()
    return {"device_memory_gb": cuda.max_memory_allocated() / 1e9} if cuda else {}


def _cuda() -> Any:
    """torch's CUDA module where torch is loaded and uses it."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
