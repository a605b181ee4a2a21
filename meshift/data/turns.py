"""Where the assistant's turns stand in a conversation that a chat template has rendered: for any template.

It knows no tokens and no columns. A turn is what generation would have had to write: from behind the template's
opening of the turn to, and with, the token that ends it.
"""

import re
from dataclasses import replace

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from meshift.data.chat import TEMPLATE_ERRORS, Conversation, Span, chat_template, refused
from meshift.errors import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
STAND_IN = "meshift stands in here"


def assistant_turns(tokenizer: PreTrainedTokenizerBase, said: Conversation, whole: str) -> list[Span]:
    """The spans of `whole`, which is `said` as rendered, that are the assistant's.

    A template with `{% generation %}` says it itself. Else message k's turn begins where the conversation
    before it, with the generation prompt, ends, and ends where the conversation up to it ends; where a template
    writes a message otherwise in the middle than at the end, it is found by its content. Raises DataError where
    none of this holds.
    """
    template = chat_template(tokenizer, said.where, said.tools)
    if GENERATION.search(template):
        return _marked(tokenizer, template, said)
    numbers = [number for number, message in enumerate(said.messages) if message["role"] == "assistant"]
    starts = [_start(tokenizer, said, number, whole) for number in numbers]
    return [
        (start, _end(tokenizer, said, number, whole, start)) for number, start in zip(numbers, starts, strict=True)
    ]


def _marked(tokenizer: PreTrainedTokenizerBase, template: str, said: Conversation) -> list[Span]:
    # apply_chat_template gives these spans in tokens only, and none where a span begins with a blank.
    try:
        _, (spans,) = render_jinja_template(
            conversations=[said.messages],
            tools=said.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except TEMPLATE_ERRORS as error:
        raise refused(said.where, error) from error
    return [(start, end) for start, end in spans]


def _start(tokenizer: PreTrainedTokenizerBase, said: Conversation, number: int, whole: str) -> int:
    if number > 0:
        opening = said.before(number).render(tokenizer, add_generation_prompt=True)
        if whole.startswith(opening):
            return len(opening)
    messages = list(said.messages)
    messages[number] = {**messages[number], "content": STAND_IN}
    changed = replace(said, messages=messages).render(tokenizer, add_generation_prompt=False)
    before, found, _ = changed.partition(STAND_IN)
    if found and whole.startswith(before):
        return len(before)
    raise _not_found(said, number)


def _end(tokenizer: PreTrainedTokenizerBase, said: Conversation, number: int, whole: str, start: int) -> int:
    ends = _turn_ends(tokenizer)
    if number + 1 == len(said.messages):
        return start + len(_without_tail(whole[start:], ends))
    closed = said.before(number + 1).render(tokenizer, add_generation_prompt=False)
    if whole.startswith(closed) and len(closed) > start:
        return start + len(_without_tail(closed[start:], ends))
    content = said.messages[number]["content"]
    for written in (content, content.strip(), content.rpartition("</think>")[2].strip()):
        if whole.startswith(written, start):
            end = start + len(written)
            return end + next((len(token) for token in ends if whole.startswith(token, end)), 0)
    raise _not_found(said, number)


def _without_tail(turn: str, ends: tuple[str, ...]) -> str:
    """Blanks behind the token that ends a turn are the template's, not the assistant's."""
    return turn.rstrip() if turn.rstrip().endswith(ends) else turn


def _turn_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    return tuple(token.content for token in tokenizer.added_tokens_decoder.values())


def _not_found(said: Conversation, number: int) -> DataError:
    return DataError(
        f"{said.where}: the chat template writes message {number + 1} otherwise within the conversation than "
        "alone, so its tokens cannot be told from the others: use loss_on=completion, or a template with "
        "{% generation %}."
    )
