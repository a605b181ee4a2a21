"""Functions and objects of the process that is tested, as the process that tests sees them.

Every use is a question to the other process, whose answer is plain data or a reference to another object there.
Whether two values are equal, true or in one another is decided on this side, never by the other's code.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from typing import Any

from meshift.rewards.sandbox.values import ValueNotPlainError, decode, encode, receive, send

CONTROL_FLOW = ("StopIteration", "StopAsyncIteration")
"""Raised where a test does not expect it, they would end its loops: `all(map(f, cases))` would be true."""


class SolutionError(Exception):
    """Raised in the other process, of a class that this one does not know."""


class SolutionEndedError(Exception):
    """The other process ended, or said something that is no answer: nothing more can be asked of it."""


class Channel:
    """Questions out by one pipe, answers in by another."""

    def __init__(self, ask: int, hear: int) -> None:
        self._ask = ask
        self._hear = hear
        self.is_open = True

    def question(self, name: str, of: Mapping[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """What using an object in this way gives. Raises what it raised there, if that is one of Python's own."""
        given = [encode(argument, _reference) for argument in arguments]
        named = {key: encode(value, _reference) for key, value in keywords.items()}
        answer = self._exchange({"use": name, "of": dict(of), "given": given, "named": named})
        try:
            self._update(arguments, answer.get("changed"))
            if "raised" in answer:
                raise _error(str(answer["raised"]), str(answer.get("text"))[:200])
            if "end" in answer:
                if name != "next":
                    raise SolutionEndedError("the program answered what was not asked")
                raise StopIteration
            return decode(answer["value"], self._resolve)
        except (ValueNotPlainError, KeyError) as error:
            if isinstance(error, KeyError) and "raised" in answer:
                raise
            raise self._broken(f"the program gave {error}") from None

    def hear(self) -> dict[str, Any]:
        """The next message."""
        try:
            message = receive(self._hear)
        except (ValueNotPlainError, OSError) as error:
            raise self._broken(f"the program gave {error}") from None
        if not isinstance(message, dict):
            raise self._broken("the program ended" if message is None else "the program gave no answer")
        return message

    def _exchange(self, question: Mapping[str, Any]) -> dict[str, Any]:
        if not self.is_open:
            raise SolutionEndedError("the program ended")
        try:
            send(self._ask, question)
        except OSError:
            raise self._broken("the program ended") from None
        return self.hear()

    def _broken(self, why: str) -> SolutionEndedError:
        self.is_open = False
        return SolutionEndedError(why)

    def _resolve(self, data: Mapping[str, Any]) -> Remote:
        ((tag, number),) = data.items()
        if tag != "h" or not isinstance(number, int):
            raise ValueNotPlainError("unreadable data (unknown tag)")
        return Remote(self, {"h": number})

    def _update(self, arguments: Sequence[Any], changed: Any) -> None:
        """Do to lists, dicts and sets that were given what the function did to its copies of them."""
        if not isinstance(changed, list) or len(changed) != len(arguments):
            return
        for own, data in zip(arguments, changed, strict=True):
            value = decode(data, self._resolve) if data is not None else None
            if type(own) is list and type(value) is list:
                own[:] = value
            elif type(own) is type(value) and isinstance(own, dict | set):
                own.clear()
                own.update(value)  # type: ignore[arg-type]  # of the same type


class Remote:
    """An object of the other process. It is equal to itself alone, and is neither true nor false."""

    __slots__ = ("_channel", "_of")

    def __init__(self, channel: Channel, of: Mapping[str, Any]) -> None:
        object.__setattr__(self, "_channel", channel)
        object.__setattr__(self, "_of", dict(of))

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """What the call gives there."""
        return self._channel.question("call", self._of, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._channel.question("get", self._of, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._channel.question("set", self._of, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._channel.question("item", self._of, key)

    def __len__(self) -> int:
        length = self._channel.question("len", self._of)
        if type(length) is not int:
            raise TypeError("a length that is no integer")
        return length

    def __str__(self) -> str:
        text = self._channel.question("str", self._of)
        if type(text) is not str:
            raise TypeError("a text that is no text")
        return text

    def __repr__(self) -> str:
        return "<an object of the program>"

    def __iter__(self) -> Any:
        return self._channel.question("iter", self._of)

    def __next__(self) -> Any:
        return self._channel.question("next", self._of)

    def __bool__(self) -> bool:
        raise TypeError("an object of the program is neither true nor false")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and self._of == other._of

    def __hash__(self) -> int:
        return hash(tuple(self._of.items()))


def _reference(value: Any) -> dict[str, Any]:
    if isinstance(value, Remote):
        return value._of
    raise TypeError(f"a value of type {type(value).__name__} cannot be given to the program")


def _error(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    known = isinstance(kind, type) and issubclass(kind, Exception) and name not in CONTROL_FLOW
    try:
        return kind(text) if known else SolutionError(f"{name}: {text}")  # type: ignore[misc]
    except TypeError:  # UnicodeDecodeError and its like take more
        return SolutionError(f"{name}: {text}")
