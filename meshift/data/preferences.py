"""Preference pairs for reward models and DPO: prompt, chosen and rejected response, tokenised.

It knows the shapes such files come in (see `load_preferences`), and nothing of losses or batches.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from transformers import PreTrainedTokenizerBase

from meshift.data.chat import says_nothing
from meshift.data.columns import number
from meshift.data.dataset import dataset_rows, warn_left_out
from meshift.data.exchanges import Encoder
from meshift.data.pairs import split_pair
from meshift.data.rows import Row
from meshift.data.unpaired import MatchedRows, is_unpaired, matched
from meshift.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two sequences that begin with the same `num_prompt_tokens` tokens (0: no prompt), then part.

    `margin`: by how much the chosen one is better, on the data's own scale; None where the data does not say.
    `weight`: the pair's share in the loss. Example: `Pair(chosen=[9, 4, 2], rejected=[9, 7, 2],
    num_prompt_tokens=1, where="hh.jsonl:1")`.
    """

    chosen: list[int]
    rejected: list[int]
    num_prompt_tokens: int
    where: str
    margin: float | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """The pairs of a dataset in its order, and where those rows stand that were left out ("path:line").

    `blank`: one of the responses is empty.
    """

    pairs: list[Pair]
    overlong: tuple[str, ...]
    identical: tuple[str, ...]
    unpaired: tuple[str, ...] = field(default=())
    blank: tuple[str, ...] = field(default=())

    @property
    def num_overlong(self) -> int:
        """How many pairs were left out because one of their sequences was over-long."""
        return len(self.overlong)

    @property
    def num_identical(self) -> int:
        """How many pairs were left out because they prefer a response to itself, which teaches nothing."""
        return len(self.identical)

    @property
    def num_blank(self) -> int:
        """How many rows were left out because a response is blank."""
        return len(self.blank)

    @property
    def num_unpaired(self) -> int:
        """How many rows of unpaired data were left out because their prompt has no row of the other label left."""
        return len(self.unpaired)


def load_preferences(
    dataset_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    append_eos: bool = True,
    apply_chat_template: bool = False,
    stop_token_ids: tuple[int, ...] = (),
) -> PreferenceData:
    """Read and tokenise `chosen` and `rejected`, with a `prompt` column or an implicit prompt (`split_pair`).

    Responses are texts or message lists; the options are those of `Encoder`. The columns `margin` and `weight`
    are read where they are. Unpaired rows (`prompt`, `completion`, `label`) make pairs where a prompt has both
    labels (`matched`). Prompt and response are tokenised apart, as generation leaves them.

    Pairs with more than `max_length` tokens on either side, pairs of twice the same response, rows with a blank
    response, and unpaired rows without a counterpart are left out, counted and logged. Raises DataError naming
    file and line of a row that fits none of this, and when no pair is left.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        append_eos=append_eos,
        apply_chat_template=apply_chat_template,
        stop_token_ids=stop_token_ids,
    )
    encoder.check(dataset_name)
    rows, unmatched = _pair_rows(dataset_name)
    blank: list[str] = []
    pairs: list[Pair] = []
    overlong: list[str] = []
    identical: list[str] = []
    for row in rows:
        pair = _pair(row, encoder)
        if pair is None:
            blank.append(row.where)
        elif pair.chosen == pair.rejected:
            identical.append(row.where)
        elif max(len(pair.chosen), len(pair.rejected)) > max_length:
            overlong.append(row.where)
        else:
            pairs.append(pair)
    num_rows = len(pairs) + len(overlong) + len(identical) + len(blank)
    warn_left_out(f"pairs with more than max_length={max_length} tokens", overlong, num_rows)
    warn_left_out("pairs whose chosen and rejected responses are the same", identical, num_rows)
    warn_left_out("pairs with a blank response", blank, num_rows)
    if not pairs:
        raise DataError(
            f"{dataset_name}: none of {num_rows} pairs can be used ({len(overlong)} have more than "
            f"max_length={max_length} tokens, {len(identical)} have the same response twice, "
            f"{len(blank)} have a blank response)."
        )
    return PreferenceData(
        pairs=pairs,
        overlong=tuple(overlong),
        identical=tuple(identical),
        unpaired=unmatched.unpaired,
        blank=(*unmatched.blank, *blank),
    )


def _pair_rows(dataset_name: str) -> tuple[Iterator[Row], MatchedRows]:
    """The rows that hold pairs, and how unpaired ones were matched. Raises DataError."""
    rows = dataset_rows(dataset_name)
    first = next(rows)
    if not is_unpaired(first):
        return chain([first], rows), MatchedRows(rows=[], unpaired=())
    judged = [first]
    for row in rows:
        if not is_unpaired(row):
            raise DataError(
                f"{row.where}: this row is none of prompt, completion and label, as {first.where} is: "
                "put rows of one form into a file."
            )
        judged.append(row)
    found = matched(judged)
    warn_left_out("unpaired completions without one of the other label", found.unpaired, len(judged))
    warn_left_out("unpaired completions that are blank", found.blank, len(judged))
    if not found.rows:
        raise DataError(
            f"{dataset_name} is unpaired (prompt, completion, label), and none of its prompts has both a liked "
            "and a disliked completion, so it makes no pairs: give chosen and rejected responses, or use a method "
            "for unpaired data."
        )
    return iter(found.rows), found


def _pair(row: Row, encoder: Encoder) -> Pair | None:
    """The row's pair; None where one of its responses is blank."""
    prompt, chosen, rejected = split_pair(row)
    if says_nothing(chosen) or says_nothing(rejected):
        return None
    sides = [encoder.exchange(prompt, side, row) for side in (chosen, rejected)]
    tokens = encoder.prompt_tokens(sides[0])
    weight = number(row, "weight")
    if weight is not None and weight < 0:
        raise DataError(f"{row.where}: 'weight' is {weight:g}: write a number that is not below zero.")
    return Pair(
        chosen=tokens + encoder.response_tokens(sides[0]),
        rejected=tokens + encoder.response_tokens(sides[1]),
        num_prompt_tokens=len(tokens),
        where=row.where,
        margin=number(row, "margin"),
        weight=1.0 if weight is None else weight,
    )
