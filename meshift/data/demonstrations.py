"""Demonstrations for supervised fine-tuning: tokens, and which of them are trained on.

It knows the shapes such files come in (see `load_demonstrations`), and nothing of losses, packing or batches.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from meshift.data.chat import Messages, says_nothing
from meshift.data.columns import answer, has, is_disliked, messages, text, text_or_messages
from meshift.data.dataset import dataset_rows, warn_left_out
from meshift.data.exchanges import Encoder, Exchange
from meshift.data.pairs import Said, split_pair
from meshift.data.rows import Row
from meshift.data.transcripts import answer_start, is_transcript
from meshift.errors import DataError

LossOn = Literal["completion", "assistant", "all"]
FORMS = {
    "messages": ("messages",),
    "prompt and completion": ("prompt", "completion"),
    "text": ("text",),
    "chosen and rejected": ("chosen", "rejected"),
}


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One sequence. Example: `Demonstration(tokens=[9, 4, 2], loss_mask=[False, True, True],
    where="sft.jsonl:12", truncated=False)`.

    `loss_mask` is as long as `tokens`, True where a token is trained on (on the first one no loss can be taken,
    whatever the mask says). A `truncated` one was cut at max_length, and has no end.
    """

    tokens: list[int]
    loss_mask: list[bool]
    where: str
    truncated: bool


@dataclass(frozen=True, kw_only=True)
class DemonstrationData:
    """The demonstrations of a dataset in its order, and where those rows stand that were left out ("path:line").

    `disliked`: rows labelled false; `blank`: rows whose answer is empty.
    """

    demonstrations: list[Demonstration]
    overlong: list[str]
    disliked: list[str] = field(default_factory=list)
    blank: list[str] = field(default_factory=list)

    @property
    def num_overlong(self) -> int:
        """How many rows were left out because they were over-long."""
        return len(self.overlong)

    @property
    def num_truncated(self) -> int:
        """How many demonstrations were cut at max_length."""
        return sum(one.truncated for one in self.demonstrations)


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a row is turned into: how long at most, and what is trained on."""

    max_length: int
    loss_on: LossOn
    truncate: bool


def load_demonstrations(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: LossOn,
    truncate: bool = False,
    append_eos: bool = True,
    apply_chat_template: bool = False,
    stop_token_ids: tuple[int, ...] = (),
) -> DemonstrationData:
    r"""Read and tokenise the dataset `name`: `messages`, `prompt` + `completion`, `text`, or preference rows.

    All rows are of one form. Of preference rows the prompt and the chosen response are taken, of unpaired ones
    (a column `label`) those that are liked. `loss_on`: "completion" trains on the column `completion`, the last
    assistant message, the last answer of an HH dialogue, all of another text; "assistant" on what the assistant
    says in the prompt, too; "all" on every token. The prompt is tokenised as generation would be given it, and
    what follows by itself. The other options are those of `Encoder`.

    A row of more than `max_length` tokens is left out, or, with `truncate`, cut at its end, where something to
    train on is left. All of it is counted and logged. Raises DataError naming file and line of a row that fits
    none of this, and when no demonstration is left.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        append_eos=append_eos,
        apply_chat_template=apply_chat_template,
        stop_token_ids=stop_token_ids,
    )
    encoder.check(name)
    shape = _Shape(max_length=max_length, loss_on=loss_on, truncate=truncate)
    data = DemonstrationData(demonstrations=[], overlong=[])
    first: tuple[str, str] | None = None
    num_rows = 0
    for row in dataset_rows(name):
        num_rows += 1
        form = _form(row, first)
        first = first or (form, row.where)
        _add(row, form, encoder, shape, data)
    _report(data, name, max_length, num_rows)
    return data


def _add(row: Row, form: str, encoder: Encoder, shape: _Shape, data: DemonstrationData) -> None:
    prompt, response = _parts(row, form, encoder)
    if form == "prompt and completion" and is_disliked(row):
        data.disliked.append(row.where)
    elif says_nothing(response):
        data.blank.append(row.where)
    elif (
        demonstration := _demonstration(_exchange(prompt, response, row, form, encoder), encoder, shape)
    ) is None:
        data.overlong.append(row.where)
    else:
        data.demonstrations.append(demonstration)


def _report(data: DemonstrationData, name: str, max_length: int, num_rows: int) -> None:
    """Log what is left out and cut. Raises DataError when nothing is left."""
    warn_left_out(f"demonstrations of more than max_length={max_length} tokens", data.overlong, num_rows)
    warn_left_out("completions that are labelled false", data.disliked, num_rows)
    warn_left_out("demonstrations whose answer is blank", data.blank, num_rows)
    if not data.demonstrations:
        raise DataError(
            f"{name}: none of {num_rows} demonstrations can be used ({data.num_overlong} have more than "
            f"max_length={max_length} tokens, {len(data.disliked)} are labelled false, "
            f"{len(data.blank)} are blank)."
        )


def _form(row: Row, first: tuple[str, str] | None) -> str:
    """The form of a row: the first in the table that it has all columns of. Raises DataError."""
    forms = [form for form, columns in FORMS.items() if all(has(row, column) for column in columns)]
    if not forms:
        raise DataError(
            f"{row.where}: the row has {sorted(row.values)}, which is no demonstration: give 'messages', 'prompt' "
            "and 'completion', or 'text'."
        )
    if len(forms) > 1 and forms[1] != "chosen and rejected":
        raise DataError(
            f"{row.where}: the row has {forms[0]} as well as {forms[1]}, and either could be the demonstration: "
            "remove one."
        )
    if first is not None and first[0] != forms[0]:
        raise DataError(
            f"{row.where}: this row has {forms[0]}, but {first[1]} has {first[0]}: "
            "put rows of one form into a file."
        )
    return forms[0]


def _exchange(prompt: Said, response: Said, row: Row, form: str, encoder: Encoder) -> Exchange:
    if form == "messages":  # a column `prompt` beside them is not what they begin with
        row = replace(row, values={**row.values, "prompt": None})
    return encoder.exchange(prompt, response, row)


def _parts(row: Row, form: str, encoder: Encoder) -> tuple[Said, Said]:
    """(prompt, response) of a row; the response may be blank. Raises DataError."""
    if form == "messages":
        return _conversation(messages(row, "messages"), row)
    if form == "text":
        return _text(text(row, "text"), row, encoder)
    if form == "prompt and completion":
        return text_or_messages(row, "prompt"), answer(row, "completion")
    prompt, chosen, _ = split_pair(row)
    return prompt, chosen


def _conversation(conversation: Messages, row: Row) -> tuple[Said, Said]:
    last = conversation[-1]["role"]
    if last != "assistant":
        raise DataError(
            f"{row.where}: 'messages' ends with a message of the role {last!r}, so nothing follows that could be "
            "learned: end with the assistant's, or remove the row."
        )
    if len(conversation) == 1:
        raise DataError(f"{row.where}: 'messages' has an answer only: put the user's message before it.")
    return conversation[:-1], conversation[-1:]


def _text(whole: str, row: Row, encoder: Encoder) -> tuple[Said, Said]:
    if is_transcript(whole):
        start = answer_start(whole)
        return whole[:start], whole[start:]
    if encoder.apply_chat_template and whole.strip():
        raise DataError(
            f"{row.where}: apply_chat_template is on, but 'text' is no dialogue of \\n\\nHuman: and "
            "\\n\\nAssistant: turns: give 'messages', or leave it off."
        )
    return "", whole


def _demonstration(exchange: Exchange, encoder: Encoder, shape: _Shape) -> Demonstration | None:
    """The tokens, cut where they may be; None where they are over-long."""
    if shape.loss_on == "assistant":
        tokens, mask = encoder.assistant_mask(exchange)
    else:
        prompt, response = encoder.prompt_tokens(exchange), encoder.response_tokens(exchange)
        tokens = prompt + response
        mask = [shape.loss_on == "all"] * len(prompt) + [True] * len(response)
    truncated = len(tokens) > shape.max_length
    if truncated:
        tokens, mask = tokens[: shape.max_length], mask[: shape.max_length]
    if truncated and not (shape.truncate and any(mask[1:])):
        return None
    if not any(mask):
        raise DataError(f"{exchange.where}: no token would be trained on: look at the chat template's text.")
    return Demonstration(tokens=tokens, loss_mask=mask, where=exchange.where, truncated=truncated)
