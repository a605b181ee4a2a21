"""Preference pairs for reward models and DPO: prompt, chosen and rejected response, tokenised.

It knows the shapes such files come in (see `load_preferences`), and nothing of losses or batches.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from meshift.data.chat import Messages, check_messages, encode, render
from meshift.data.dataset import dataset_rows, warn_left_out
from meshift.data.rows import Row
from meshift.errors import DataError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two sequences that begin with the same `num_prompt_tokens` tokens (0: no prompt), then part.

    Example: `Pair(chosen=[9, 4, 2], rejected=[9, 7, 2], num_prompt_tokens=1, where="hh.jsonl:1")`.
    """

    chosen: list[int]
    rejected: list[int]
    num_prompt_tokens: int
    where: str


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """The pairs of a dataset in its order, and where those stand that were left out ("path:line")."""

    pairs: list[Pair]
    overlong: tuple[str, ...]
    identical: tuple[str, ...]

    @property
    def num_overlong(self) -> int:
        """How many pairs were left out because one of their sequences was over-long."""
        return len(self.overlong)

    @property
    def num_identical(self) -> int:
        """How many pairs were left out because they prefer a response to itself, which teaches nothing."""
        return len(self.identical)


@dataclass(frozen=True, kw_only=True)
class _Texts:
    """A pair before tokenising. `rendered` by a chat template, which has written special tokens out."""

    prompt: str
    chosen: str
    rejected: str
    rendered: bool = False


def load_preferences(
    dataset_name: str, tokenizer: PreTrainedTokenizerBase, *, max_length: int, append_eos: bool = True
) -> PreferenceData:
    r"""Read and tokenise `chosen` and `rejected`, with a `prompt` column or without one.

    Responses are texts or message lists. Without `prompt` the prompt is what both have in common: leading
    messages of message lists; of texts in the manner of Anthropic HH (`\n\nHuman: ... \n\nAssistant: ...`)
    all up to the last `\n\nAssistant:` they share; of other texts nothing. Prompt and response are
    tokenised apart, as generation leaves them. `append_eos`: responses are complete, so each ends in EOS
    exactly once (text that a template writes after EOS is cut); False is for texts that were cut somewhere.

    Pairs with more than `max_length` tokens on either side, and pairs of twice the same response, are left
    out, counted and logged. Raises DataError naming file and line of a row that fits none of this, and when
    no pair is left; also where EOS is to be appended and the tokenizer has none.
    """
    if append_eos and tokenizer.eos_token is None:
        raise DataError(
            f"{dataset_name}: data.append_eos is on, but the tokenizer has no end-of-sequence token: set "
            "data.append_eos=false, or eos_token in the model's tokenizer_config.json."
        )
    rows = dataset_rows(dataset_name)
    pairs: list[Pair] = []
    overlong: list[str] = []
    identical: list[str] = []
    for row in rows:
        pair = _pair(row, tokenizer, append_eos)
        if pair.chosen == pair.rejected:
            identical.append(row.where)
        elif max(len(pair.chosen), len(pair.rejected)) > max_length:
            overlong.append(row.where)
        else:
            pairs.append(pair)
    warn_left_out(f"pairs with more than max_length={max_length} tokens", overlong, len(rows))
    warn_left_out("pairs whose chosen and rejected responses are the same", identical, len(rows))
    if not pairs:
        raise DataError(
            f"{dataset_name}: none of {len(rows)} pairs can be used ({len(overlong)} have more than "
            f"max_length={max_length} tokens, {len(identical)} have the same response twice)."
        )
    return PreferenceData(pairs=pairs, overlong=tuple(overlong), identical=tuple(identical))


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, append_eos: bool) -> Pair:
    texts = _texts(row, tokenizer)
    prompt = encode(tokenizer, texts.prompt, opening=not texts.rendered)
    sides = [_response(tokenizer, text, append_eos) for text in (texts.chosen, texts.rejected)]
    return Pair(
        chosen=prompt + sides[0], rejected=prompt + sides[1], num_prompt_tokens=len(prompt), where=row.where
    )


def _response(tokenizer: PreTrainedTokenizerBase, text: str, append_eos: bool) -> list[int]:
    if append_eos:
        text = text.rstrip() if text.rstrip().endswith(tokenizer.eos_token) else text + tokenizer.eos_token
    return encode(tokenizer, text)


def _texts(row: Row, tokenizer: PreTrainedTokenizerBase) -> _Texts:
    chosen, rejected = _side(row, "chosen"), _side(row, "rejected")
    prompt = _side(row, "prompt") if row.values.get("prompt") is not None else None
    if isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            chosen, rejected = _said(chosen, "assistant"), _said(rejected, "assistant")
            return _rendered(prompt, chosen, rejected, row, tokenizer)
        return _plain(prompt, chosen, rejected, row.where)
    if isinstance(chosen, list) and isinstance(rejected, list):
        if isinstance(prompt, str):
            # Some hub datasets repeat the prompt as the first message of both sides.
            alone = chosen[0]["role"] == "assistant"
            prompt = _said(prompt, "user") if alone else None
        if prompt is None:
            num_shared = _num_shared(chosen, rejected)
            prompt, chosen, rejected = chosen[:num_shared], chosen[num_shared:], rejected[num_shared:]
        return _rendered(prompt, chosen, rejected, row, tokenizer)
    raise DataError(
        f"{row.where}: of 'chosen' and 'rejected' one is a text, one a list of messages: make them alike."
    )


def _side(row: Row, column: str) -> str | Messages:
    if column not in row.values:
        raise DataError(f"{row.where}: the column {column!r} is missing; the row has {sorted(row.values)}.")
    value: Any = row.values[column]
    if not isinstance(value, str):
        return check_messages(value, column, row.where)
    if not value.strip():
        raise DataError(f"{row.where}: {column!r} is blank: give it a text or remove the row.")
    return value


def _said(text: str, role: str) -> Messages:
    return [{"role": role, "content": text}]


def _plain(prompt: str | None, chosen: str, rejected: str, where: str) -> _Texts:
    if prompt is None:
        prompt = _shared_dialogue(chosen, rejected, where)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _Texts(prompt=prompt, chosen=chosen, rejected=rejected)


def _shared_dialogue(chosen: str, rejected: str, where: str) -> str:
    r"""What two HH dialogues share, up to and with the last `\n\nAssistant:`; "" if they are none."""
    if not (chosen.startswith(HUMAN) and rejected.startswith(HUMAN)):
        return ""
    num_shared = _num_shared(chosen, rejected)
    turn = chosen.rfind(ASSISTANT, 0, num_shared)
    if turn < 0:
        raise DataError(
            f"{where}: the dialogues share no Assistant turn: add a column 'prompt' or remove the row."
        )
    return chosen[: turn + len(ASSISTANT)]


def _num_shared(first: Any, second: Any) -> int:
    """How many leading elements two sequences share, leaving at least one to the shorter."""
    longest = min(len(first), len(second)) - 1
    return next((i for i in range(longest) if first[i] != second[i]), longest)


def _rendered(
    prompt: Messages, chosen: Messages, rejected: Messages, row: Row, tokenizer: PreTrainedTokenizerBase
) -> _Texts:
    if not prompt:
        raise DataError(f"{row.where}: 'chosen' and 'rejected' share no first message: add a column 'prompt'.")
    opening = render(tokenizer, prompt, row.where, add_generation_prompt=True)
    wholes = [
        render(tokenizer, prompt + side, row.where, add_generation_prompt=False) for side in (chosen, rejected)
    ]
    if not all(whole.startswith(opening) for whole in wholes):
        raise DataError(
            f"{row.where}: the response does not follow the prompt in the chat template's text: "
            "let 'chosen' and 'rejected' part at an assistant message."
        )
    return _Texts(
        prompt=opening, chosen=wholes[0][len(opening) :], rejected=wholes[1][len(opening) :], rendered=True
    )
