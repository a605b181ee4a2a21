r"""Dialogues in one text, in the manner of Anthropic HH: `\n\nHuman: ... \n\nAssistant: ...`. No tokens."""

import re

from meshift.data.chat import Messages, Span
from meshift.errors import DataError

# Lines may end in \r\n, as texts from Windows do, and the first turn may have lost its blank lines to a strip().
TURN = re.compile(r"(?:\A\s*|\r\n\r\n|\n\n)(Human|Assistant):")
ROLE = {"Human": "user", "Assistant": "assistant"}


def opens_dialogue(text: str) -> bool:
    r"""Whether `text` begins as such a dialogue: with `\n\nHuman:`, or with `Human:` and an Assistant turn."""
    return text.startswith(("\n\nHuman:", "\r\n\r\nHuman:")) or is_transcript(text)


def is_transcript(text: str) -> bool:
    """Whether `text` is such a dialogue: the human begins, and the assistant has a turn."""
    first = TURN.match(text)
    return first is not None and first[1] == "Human" and bool(_answer_starts(text))


def answer_start(text: str) -> int:
    r"""Where the last answer of a dialogue begins: after its last `\n\nAssistant:`."""
    return _answer_starts(text)[-1]


def shared_dialogue(chosen: str, rejected: str, where: str) -> str:
    r"""What two dialogues share, up to and with the last `\n\nAssistant:`; "" if they are none.

    Beside a blank text a dialogue is parted at its last answer. Raises DataError where one is none, or where they
    share no such turn.
    """
    dialogues = [side for side in (chosen, rejected) if opens_dialogue(side)]
    if not dialogues:
        return ""
    if not (chosen.strip() and rejected.strip()):
        return dialogues[0][: answer_start(dialogues[0])] if is_transcript(dialogues[0]) else ""
    if len(dialogues) == 1:
        raise DataError(
            f"{where}: of 'chosen' and 'rejected' one is a dialogue of Human: and Assistant: turns, and the other "
            "is none: make them alike."
        )
    shared = num_shared(chosen, rejected, leave=0)
    starts = [start for start in _answer_starts(chosen) if start <= shared]
    if not starts:
        raise DataError(
            f"{where}: the dialogues share no Assistant turn: add a column 'prompt' or remove the row."
        )
    return chosen[: starts[-1]]


def num_shared(first: str | Messages, second: str | Messages, *, leave: int = 1) -> int:
    """How many leading elements two sequences share, leaving at least `leave` to the shorter."""
    longest = min(len(first), len(second)) - leave
    return next((i for i in range(longest) if first[i] != second[i]), longest)


def transcript_messages(text: str) -> Messages:
    r"""The dialogue's turns as messages, without the blanks around them.

    Turns of one speaker in a row are joined by a blank line, since chat templates want roles to alternate. An
    open `\n\nAssistant:` at the end is no message. The assistant's words at the end keep the blanks behind them:
    where the text is a prompt, they are gone on with.
    """
    turns: list[tuple[str, list[str]]] = []
    _, *pieces = TURN.split(text)
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        if not turns or turns[-1][0] != speaker:
            turns.append((speaker, []))
        turns[-1][1].append(said)
    messages = [{"role": ROLE[speaker], "content": _joined(said).strip()} for speaker, said in turns]
    if turns and turns[-1][0] == "Assistant":
        messages[-1]["content"] = _joined(turns[-1][1])
    if messages and not messages[-1]["content"]:
        messages.pop()
    return messages


def answers(text: str) -> list[Span]:
    """Where the assistant speaks: from behind each of its markers to the next marker or the end."""
    marks = list(TURN.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [(mark.end(), end) for mark, end in zip(marks, ends, strict=True) if mark[1] == "Assistant"]


def _answer_starts(text: str) -> list[int]:
    return [start for start, _ in answers(text)]


def _joined(said: list[str]) -> str:
    return "\n\n".join([*(one.strip() for one in said[:-1]), said[-1].lstrip()]).lstrip()
