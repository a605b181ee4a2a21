"""The process that a reward function with a time limit runs in: JSON lines in on stdin, answers out on stdout.

It holds one function, and knows nothing of time limits of plain functions: whoever started it kills it.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
from queue import SimpleQueue
from typing import Any, TextIO

from meshift.errors import ConfigError
from meshift.rewards.calling import EventLoopThread, Invoker
from meshift.rewards.loading import load_function
from meshift.rewards.scores import CallError
from meshift.rewards.signatures import read_signature


def main() -> None:
    """Load the function that the first line names, say so, and answer one line for every further one."""
    requests, answers = _private_pipes()
    first = json.loads(requests.readline())
    lines: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_read, args=(requests, lines), daemon=True).start()
    try:
        invoker = _load(first)
    except ConfigError as error:
        _say(answers, {"refused": str(error)})
        return
    _say(answers, {"ready": True})
    while True:
        _say(answers, _answer(invoker, json.loads(lines.get())))


def _private_pipes() -> tuple[TextIO, TextIO]:
    """The two pipes under other numbers: what the function reads is empty, what it prints goes to stderr."""
    requests, answers = os.dup(0), os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return os.fdopen(requests, encoding="utf-8"), os.fdopen(answers, "w", encoding="utf-8")


def _read(requests: TextIO, lines: SimpleQueue[str]) -> None:
    """Pass requests on. Their end is that of the run, killed or not: nothing is left behind."""
    for line in requests:
        lines.put(line)
    os._exit(0)


def _load(first: dict[str, Any]) -> Invoker:
    function = load_function(first["spec"])
    signature = read_signature(function)
    if signature is None:
        raise ConfigError(f"{first['spec']} has changed since the run began; start it again")
    return Invoker(function=function, signature=signature, loop=EventLoopThread(), timeout_s=first["timeout_s"])


def _answer(invoker: Invoker, request: dict[str, Any]) -> dict[str, Any]:
    _seed_generators(request["seed"])
    try:
        return {"scores": invoker(request["calls"], request["num_samples"]).to_json()}
    except CallError as failure:
        return {"what": failure.fault.what, "kind": failure.fault.kind}


def _seed_generators(seed: int) -> None:
    """Start the generators that the function may draw from anew; it has imported their modules, if it does."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    sys.stderr.flush()
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
