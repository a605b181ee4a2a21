r"""Dialogues in one text, in the manner of Anthropic HH: `\n\nHuman: ... \n\nAssistant: ...`. No tokens."""

import re

from meshift.data.chat import Messages, Span
from meshift.errors import DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
TURN = re.compile(f"({HUMAN}|{ASSISTANT})")
ROLE = {HUMAN: "user", ASSISTANT: "assistant"}


def is_transcript(text: str) -> bool:
    r"""Whether `text` is such a dialogue: it begins with `\n\nHuman:` and the assistant has a turn."""
    return text.startswith(HUMAN) and ASSISTANT in text


def answer_start(text: str) -> int:
    r"""Where the last answer of a dialogue begins: after its last `\n\nAssistant:`."""
    return text.rindex(ASSISTANT) + len(ASSISTANT)


def shared_dialogue(chosen: str, rejected: str, where: str) -> str:
    r"""What two dialogues share, up to and with the last `\n\nAssistant:`; "" if they are none."""
    if not (chosen.startswith(HUMAN) and rejected.startswith(HUMAN)):
        return ""
    turn = chosen.rfind(ASSISTANT, 0, num_shared(chosen, rejected))
    if turn < 0:
        raise DataError(
            f"{where}: the dialogues share no Assistant turn: add a column 'prompt' or remove the row."
        )
    return chosen[: turn + len(ASSISTANT)]


def num_shared(first: str | Messages, second: str | Messages) -> int:
    """How many leading elements two sequences share, leaving at least one to the shorter."""
    longest = min(len(first), len(second)) - 1
    return next((i for i in range(longest) if first[i] != second[i]), longest)


def transcript_messages(text: str) -> Messages:
    """The dialogue's turns as messages, without the blanks around them.

    Turns of one speaker in a row are joined by a blank line, since chat templates want roles to alternate; a
    last turn that is blank (a prompt's open `\n\nAssistant:`) is left out.
    """
    messages: Messages = []
    _, *pieces = TURN.split(text)
    for marker, said in zip(pieces[::2], pieces[1::2], strict=True):
        if messages and messages[-1]["role"] == ROLE[marker]:
            messages[-1]["content"] = f"{messages[-1]['content']}\n\n{said.strip()}".strip()
        else:
            messages.append({"role": ROLE[marker], "content": said.strip()})
    if messages and not messages[-1]["content"]:
        messages.pop()
    return messages


def answers(text: str) -> list[Span]:
    """Where the assistant speaks: from behind each of its markers to the next marker or the end."""
    marks = list(TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [(mark.end(), end) for mark, end in zip(marks, ends, strict=True) if mark[0] == ASSISTANT]
