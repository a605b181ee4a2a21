"""Message lists, `[{"role": ..., "content": ...}, ...]`: checked, rendered, tokenised; it knows no columns."""

from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from meshift.errors import DataError

Messages = list[dict[str, Any]]


def check_messages(value: Any, column: str, where: str) -> Messages:
    """`value`, when it is a non-empty list of objects with the texts role and content; else DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column!r} must be a text or a non-empty list of messages.")
    for number, message in enumerate(value, start=1):
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
            raise DataError(
                f"{where}: message {number} of {column!r} must be an object with texts 'role' and 'content'."
            )
    return value


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str, *, add_generation_prompt: bool
) -> str:
    """The conversation as the tokenizer's chat template writes it. Raises DataError when it cannot."""
    if tokenizer.chat_template is None:
        raise DataError(f"{where}: the row holds messages, but the tokenizer has no chat template: give texts.")
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the chat template refuses these messages ({error}): correct them.") from error


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, opening: bool = False) -> list[int]:
    """Token ids of `text`. `opening` a sequence, it gets the BOS that the tokenizer itself would put."""
    tokens: list[int] = tokenizer(text, add_special_tokens=opening)["input_ids"]
    return tokens
