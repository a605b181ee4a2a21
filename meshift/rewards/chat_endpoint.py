"""Questions to a model behind OpenAI's chat completions, several at the same time, each read by whoever asks.

It knows nothing of rewards or verdicts.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from meshift.config.reward_kwargs import ChatEndpointConfig
from meshift.errors import ConfigError
from meshift.rewards.http import JsonServer, check_url
from meshift.rewards.scores import TIMEOUT, CallError, Fault

MAX_LOST = 5  # questions in a row that may time out or find no server; after them the others are not put
NUM_SHOWN = 60  # characters of an answer that an error quotes
EXAMPLE = "http://127.0.0.1:8000/v1"
NOT_ASKED = Fault(f"was not asked, after {MAX_LOST} questions in a row without an answer,", "not tried")
Read = TypeVar("Read")


class UnreadableError(Exception):
    """What a `read` raises for an answer that does not hold what was asked for; the text says what that is."""


def last_labelled(label: str, value: str, answer: str) -> str | None:
    """The value in the answer's last line of the form `Label: value`, with the marks and the remark in brackets
    that models put around them; None without any. `value` is a regular expression with one group.

    Where the label stands in a sentence, or without a colon, it is none: judges reason about ratings too.
    """
    before, after = r"(?:[^\w\n]|_){0,12}", r"[*_`\[(<\"' \t]{0,9}"
    opening = rf"^{before}(?:(?:my|the|final|overall)[^\S\n]+){{0,3}}{label}"
    remark = rf"{before}?(?:\([^()\n]*\){before}?)?[:=]"
    found = re.findall(opening + remark + after + value, answer, re.IGNORECASE | re.MULTILINE)
    return str(found[-1]) if found else None


class ChatEndpoint(Generic[Read]):
    """Asks, and puts a question again whose answer `read` cannot make anything of.

    Raises `ConfigError` for an address that none can have, or a key that is not in the environment.
    """

    def __init__(self, config: ChatEndpointConfig, read: Callable[[str], Read]) -> None:
        check_url(config.url, "the judge's server", EXAMPLE)
        self.config = config
        self._read = read
        headers = {}
        if config.api_key_env is not None:
            key = os.environ.get(config.api_key_env, "").strip()
            if not key:
                raise ConfigError(
                    f"the judge's api_key_env names {config.api_key_env}, which is not in the environment; "
                    "export it"
                )
            headers["Authorization"] = f"Bearer {key}"
        url = config.url.rstrip("/") + "/chat/completions"
        self._server = JsonServer(url, config.timeout_s, headers, expected="choices")

    def ask_all(
        self, questions: Sequence[str], on_answered: Callable[[int, int], None] | None = None
    ) -> list[Read | Fault]:
        """What was read in each answer, or what went wrong, in the order of the questions.

        `on_answered` hears how many are done, those that are not put too, and how many of them have no answer that
        could be read; in any thread.
        """
        lost, lock, done, failed = _Count(), threading.Lock(), 0, 0

        def one(question: str) -> Read | Fault:
            nonlocal done, failed
            said: Read | Fault = NOT_ASKED if lost.count >= MAX_LOST else self._said(question, lost)
            with lock:
                done += 1
                failed += isinstance(said, Fault)
                if on_answered is not None:
                    on_answered(done, failed)
            return said

        with ThreadPoolExecutor(self.config.num_concurrent, thread_name_prefix="judge") as threads:
            return list(threads.map(one, questions))

    def _said(self, question: str, lost: _Count) -> Read | Fault:
        """What was read, or the fault; `lost` counts questions in a row that found nobody."""
        try:
            answer = self._ask(question)
        except CallError as error:
            if error.fault.kind in (TIMEOUT, "connection"):
                lost.add()
            else:
                lost.reset()
            return error.fault
        lost.reset()
        return answer

    def _ask(self, question: str) -> Read | Fault:
        messages = [{"role": "user", "content": question}]
        for attempt in range(self.config.num_tries):
            answer = self._answer(messages)
            try:
                return self._read(answer)
            except UnreadableError as error:
                if attempt == self.config.num_tries - 1:
                    shown = answer if len(answer) <= NUM_SHOWN else f"...{answer[-NUM_SHOWN:]}"
                    return Fault(f"got {error} in {self.config.num_tries} tries ({shown!r})", "unreadable")
                again = f"Your answer holds {error}. Give that line alone."
                messages = [
                    *messages,
                    {"role": "assistant", "content": answer},
                    {"role": "user", "content": again},
                ]
        raise AssertionError("the last try returns")

    def _answer(self, messages: list[dict[str, str]]) -> str:
        config = self.config
        given = {"temperature": config.temperature, "max_tokens": config.max_tokens}
        settings = {name: value for name, value in given.items() if value is not None}
        answer: Any = self._server.post({"model": config.model, **settings, "messages": messages})
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            raise CallError(Fault("got an answer without choices[0].message.content", "http"))
        return content


class _Count:
    """Counts in several threads."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.count += 1

    def reset(self) -> None:
        with self._lock:
            self.count = 0
