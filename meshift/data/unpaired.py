"""Unpaired preferences: a prompt, one completion, and whether it was liked; and pairs made of such.

It knows nothing of losses or batches.
"""

import json
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from meshift.data.chat import Messages, says_nothing
from meshift.data.columns import answer, has, missing, text_or_messages, truth
from meshift.data.dataset import dataset_rows, warn_left_out
from meshift.data.exchanges import Encoder
from meshift.data.rows import Row
from meshift.errors import DataError

COLUMNS = ("prompt", "completion", "label")


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One sequence of which the first `num_prompt_tokens` are the prompt, and whether its completion was liked.

    Example: `Judged(tokens=[9, 4, 2], num_prompt_tokens=1, label=True, where="feedback.jsonl:1")`.
    """

    tokens: list[int]
    num_prompt_tokens: int
    label: bool
    where: str


@dataclass(frozen=True, kw_only=True)
class UnpairedData:
    """The judged completions of a dataset in its order, and where those stand that were left out ("path:line")."""

    judged: list[Judged]
    overlong: tuple[str, ...]
    blank: tuple[str, ...] = ()

    @property
    def num_overlong(self) -> int:
        """How many rows were left out because they were over-long."""
        return len(self.overlong)


def load_unpaired(
    dataset_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    append_eos: bool = True,
    apply_chat_template: bool = False,
    stop_token_ids: tuple[int, ...] = (),
) -> UnpairedData:
    """Read and tokenise `prompt`, `completion` and `label` (true or false), for methods that need no pairs.

    Prompts and completions are texts or message lists; the options are those of `Encoder`. Rows of more than
    `max_length` tokens and blank completions are left out, counted and logged. Raises DataError naming file and
    line of a row that is none such, and when none is left.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        append_eos=append_eos,
        apply_chat_template=apply_chat_template,
        stop_token_ids=stop_token_ids,
    )
    encoder.check(dataset_name)
    judged: list[Judged] = []
    overlong: list[str] = []
    blank: list[str] = []
    for row in dataset_rows(dataset_name):
        one = _judged(row, encoder)
        if one is None:
            blank.append(row.where)
        elif len(one.tokens) > max_length:
            overlong.append(one.where)
        else:
            judged.append(one)
    num_rows = len(judged) + len(overlong) + len(blank)
    warn_left_out(f"completions that with their prompt have more than {max_length} tokens", overlong, num_rows)
    warn_left_out("completions that are blank", blank, num_rows)
    if not judged:
        raise DataError(
            f"{dataset_name}: none of {num_rows} rows can be used ({len(overlong)} have more than "
            f"max_length={max_length} tokens, {len(blank)} are blank)."
        )
    return UnpairedData(judged=judged, overlong=tuple(overlong), blank=tuple(blank))


def is_unpaired(row: Row) -> bool:
    """Whether the row judges one completion and holds no pair."""
    return all(has(row, column) for column in COLUMNS) and not (has(row, "chosen") or has(row, "rejected"))


@dataclass(frozen=True, kw_only=True)
class MatchedRows:
    """Rows with `prompt`, `chosen` and `rejected`; where those stand that found no counterpart or are blank."""

    rows: list[Row]
    unpaired: tuple[str, ...]
    blank: tuple[str, ...] = ()


def matched(rows: list[Row]) -> MatchedRows:
    """Pairs of unpaired rows: of each prompt the i-th liked completion with the i-th disliked one.

    So no row is used twice, and what a prompt has more of one kind is left over. The pairs come in the order of
    their liked rows.
    """
    blank = [row for row in rows if says_nothing(answer(row, "completion"))]
    places = {row.where for row in blank}
    rows = [row for row in rows if row.where not in places]
    groups: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        key = json.dumps(_key(text_or_messages(row, "prompt")))
        groups.setdefault(key, ([], []))[0 if truth(row, "label") else 1].append(row)
    order = {id(row): number for number, row in enumerate(rows)}
    pairs = [pair for liked, disliked in groups.values() for pair in zip(liked, disliked, strict=False)]
    pairs.sort(key=lambda pair: order[id(pair[0])])
    used = {id(row) for pair in pairs for row in pair}
    return MatchedRows(
        rows=[_pair_row(liked, disliked) for liked, disliked in pairs],
        unpaired=tuple(row.where for row in rows if id(row) not in used),
        blank=tuple(row.where for row in blank),
    )


def _key(prompt: str | Messages) -> object:
    return prompt if isinstance(prompt, str) else [[one["role"], one["content"]] for one in prompt]


def _pair_row(liked: Row, disliked: Row) -> Row:
    values = {
        "prompt": liked.values["prompt"],
        "chosen": liked.values["completion"],
        "rejected": disliked.values["completion"],
    }
    return Row(values=values, where=f"{liked.where} with {disliked.where.rpartition(':')[2]}")


def _judged(row: Row, encoder: Encoder) -> Judged | None:
    """The row's tokens; None where its completion is blank."""
    for column in COLUMNS:
        if not has(row, column):
            raise missing(row, column)
    asked, said = text_or_messages(row, "prompt"), answer(row, "completion")
    if says_nothing(said):
        return None
    exchange = encoder.exchange(asked, said, row)
    prompt = encoder.prompt_tokens(exchange)
    return Judged(
        tokens=prompt + encoder.response_tokens(exchange),
        num_prompt_tokens=len(prompt),
        label=truth(row, "label"),
        where=row.where,
    )
