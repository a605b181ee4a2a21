"""Message lists, `[{"role": ..., "content": ...}, ...]`: checked, rendered, tokenised; it knows no columns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from meshift.errors import DataError

Messages = list[dict[str, Any]]
Span = tuple[int, int]
"""Characters [start, end) of a text."""

ROLES = ("system", "developer", "user", "assistant", "tool")
MAY_BE_BLANK = ("system", "developer", "tool")
MEANT = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
# What a template raises on messages that it does not take: its own words, or what Python says of its expressions.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


def check_messages(
    value: Any, column: str, where: str, *, or_text: bool = True, may_end_blank: bool = False
) -> Messages:
    """`value`, when it is a non-empty list of messages with a known role and a text; else DataError.

    The content of a user's or assistant's message is not blank, but for an assistant's that calls tools, and,
    where the list `may_end_blank`, for an assistant's at its end. Parts of a content (`{"type": "text", ...}`)
    are joined; keys that are null are left out, as tables write them for another row's. `or_text`: the column may
    hold a text as well, which the sentence then says.
    """
    if not isinstance(value, list) or not value:
        kinds = "a text or a non-empty list of messages" if or_text else "a non-empty list of messages"
        raise DataError(f"{where}: {column!r} must be {kinds}{_found(value)}.")
    messages = [
        _message(one, f"{where}: message {number} of {column!r}") for number, one in enumerate(value, start=1)
    ]
    for number, message in enumerate(messages, start=1):
        may_be_blank = may_end_blank and number == len(messages) and message["role"] == "assistant"
        if not may_be_blank and message["role"] not in MAY_BE_BLANK and says_nothing([message]):
            raise DataError(f"{where}: message {number} of {column!r} is blank: give it a text or remove the row.")
    return messages


def says_nothing(response: str | Messages) -> bool:
    """Whether a response is blank: a text, or messages the last of which has no content and calls no tool."""
    if isinstance(response, str):
        return not response.strip()
    return not response[-1]["content"].strip() and not response[-1].get("tool_calls")


def check_asks(messages: Messages, column: str, where: str) -> None:
    """Raise `DataError` where nobody asks: a prompt of system messages only."""
    if not any(message["role"] not in ("system", "developer") for message in messages):
        raise DataError(f"{where}: {column!r} has system messages only: add a user's message.")


def _found(value: Any) -> str:
    if isinstance(value, list):
        return ", and this list is empty"
    return "" if value is None else f", not {type(value).__name__}"


def _message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError(f"{what} must be an object with texts 'role' and 'content'.")
    if {"from", "value"} <= message.keys():
        raise DataError(f"{what} has the keys 'from' and 'value': write them as 'role' and 'content'.")
    message = {key: one for key, one in message.items() if one is not None}
    calls_tools = isinstance(message.get("tool_calls"), list) and bool(message["tool_calls"])
    if calls_tools and "content" not in message:
        message["content"] = ""
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], what)
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise DataError(f"{what} must be an object with texts 'role' and 'content'.")
    role = message["role"]
    if role not in ROLES:
        hint = f"write {MEANT[role]!r}" if role in MEANT else f"use one of {', '.join(ROLES)}"
        raise DataError(f"{what} has the role {role!r}: {hint}.")
    return message


def _joined(parts: list[Any], what: str) -> str:
    """The text of a content that is written in parts."""
    for number, part in enumerate(parts, start=1):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise DataError(f"{what} has a part of the type {kind!r}: only texts are read; remove it or the row.")
        if kind is None or not isinstance(part.get("text"), str):
            raise DataError(
                f'{what} has a content whose part {number} is none: write {{"type": "text", "text": ...}}, or the '
                "content as one text."
            )
    return "".join(part["text"] for part in parts)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages for a chat template. Example: `Conversation(messages=[{"role": "user", "content": "Hi"}],
    where="a.jsonl:1")`.

    `tools` are the JSON schemas of functions that may be called, where the row has any. One that `goes_on` is a
    prompt that ends with the assistant's words: what follows belongs to the same message.
    """

    messages: Messages
    where: str
    tools: list[Any] | None = None
    goes_on: bool = False

    def before(self, number: int) -> "Conversation":
        """The messages before message `number`, counted from 0."""
        return replace(self, messages=self.messages[:number])

    def then(self, messages: Messages) -> "Conversation":
        """The conversation, gone on with. Raises DataError where it is to go on within a message and does not."""
        if not self.goes_on:
            return replace(self, messages=self.messages + messages)
        last, first = self.messages[-1], messages[0]
        if first["role"] != "assistant":
            raise DataError(
                f"{self.where}: 'prompt' ends with the assistant's words, and what follows is of the role "
                f"{first['role']!r}: go on with the assistant's, or end 'prompt' with the user's."
            )
        joined = {**last, **first, "content": last["content"] + first["content"]}
        return replace(self, messages=[*self.messages[:-1], joined, *messages[1:]], goes_on=False)

    def opening(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The text as generation is given it: with the assistant's turn opened, or its last message left open."""
        return render(
            tokenizer,
            self.messages,
            self.where,
            add_generation_prompt=not self.goes_on,
            continue_final_message=self.goes_on,
            tools=self.tools,
        )

    def render(self, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
        """The text, as `render` has it."""
        return render(
            tokenizer, self.messages, self.where, add_generation_prompt=add_generation_prompt, tools=self.tools
        )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    where: str,
    *,
    add_generation_prompt: bool,
    continue_final_message: bool = False,
    tools: list[Any] | None = None,
) -> str:
    """The conversation as the tokenizer's chat template writes it. Raises DataError when it cannot.

    `continue_final_message` leaves the last message open, without its end.
    """
    template = chat_template(tokenizer, where, tools)
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        )
    except TEMPLATE_ERRORS as error:
        raise refused(where, error) from error


def chat_template(tokenizer: PreTrainedTokenizerBase, where: str, tools: list[Any] | None = None) -> str:
    """The tokenizer's template; of several, the one for a conversation with `tools` or without."""
    if not tokenizer.chat_template:
        raise DataError(f"{where}: the row holds messages, but the tokenizer has no chat template: give texts.")
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        names = ", ".join(sorted(tokenizer.chat_template))
        raise DataError(
            f"{where}: the tokenizer has several chat templates ({names}) and none called 'default': name one so."
        ) from error


def refused(where: str, error: Exception) -> DataError:
    """What to say when the chat template raised."""
    words = " ".join(str(error).split())
    if words.startswith("continue_final_message is set"):
        return DataError(
            f"{where}: 'prompt' ends with the assistant's words, and the chat template does not write them as "
            "they are, so they cannot be gone on with: end 'prompt' with the user's message."
        )
    return DataError(f"{where}: the chat template refuses these messages ({words}): correct them.")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, opening: bool = False) -> list[int]:
    """Token ids of `text`. `opening` a sequence, it gets the BOS that the tokenizer itself would put."""
    tokens: list[int] = tokenizer(text, add_special_tokens=opening)["input_ids"]
    return tokens[: _num_open(tokenizer, text, tokens, opening)]


def encode_with_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, *, opening: bool = False
) -> tuple[list[int], list[Span]]:
    """As `encode`, and the characters each token stands for (some tokenizers leave out its leading blank)."""
    encoded = tokenizer(text, add_special_tokens=opening, return_offsets_mapping=True)
    end = _num_open(tokenizer, text, encoded["input_ids"], opening)
    return encoded["input_ids"][:end], [tuple(span) for span in encoded["offset_mapping"][:end]]


def _num_open(tokenizer: PreTrainedTokenizerBase, text: str, tokens: list[int], opening: bool) -> int:
    """How many of the tokens are to be kept: some tokenizers put EOS behind a text, but an opening goes on."""
    closed = opening and tokens and tokens[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return len(tokens) - 1 if closed else len(tokens)


def tokens_inside(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens begin inside one of `spans`.

    A token without characters is a blank of which the tokenizer gives the end only: it began before that.
    """
    return [
        any(start <= first < end if first < last else start < first <= end for start, end in spans)
        for first, last in offsets
    ]
