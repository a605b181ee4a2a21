"""Prompts for generation: a file's rows, tokenised, with the other columns kept for reward functions.

It knows nothing of sampling, rewards or batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from meshift.data.chat import Messages, check_asks, encode
from meshift.data.columns import has, missing, shown, text_or_messages
from meshift.data.dataset import dataset_rows, warn_left_out
from meshift.data.exchanges import Encoder
from meshift.data.pairs import split_pair
from meshift.data.rows import Row
from meshift.errors import DataError

ANSWER_COLUMNS = ("ground_truth", "answer", "label")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt. Example: `Prompt(tokens=[1348, 7704], text="This movie", columns={"source": "imdb"},
    where="prompts.jsonl:1")`.

    `text` is what `tokens` encode: the row's own text, or its `messages` as the chat template renders them.
    """

    tokens: list[int]
    text: str
    columns: dict[str, Any]
    where: str = ""
    messages: Messages | None = None


@dataclass(frozen=True, kw_only=True)
class PromptData:
    """The prompts of a dataset in its order, and where those stand that were over-long ("path:line")."""

    prompts: list[Prompt]
    overlong: tuple[str, ...]

    @property
    def num_overlong(self) -> int:
        """How many rows were left out because their prompt was over-long."""
        return len(self.overlong)


def load_prompts(
    dataset_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_length: int,
    limit: int | None = None,
    apply_chat_template: bool = False,
) -> PromptData:
    """Read and tokenise the column `prompt` (a text, tokenised as it is, or messages, by the chat template).

    `apply_chat_template` makes messages of texts (`Encoder`). Where there is no `prompt`, preference rows give
    the one their responses share. The other columns are kept, with the ground truth under all its names
    (`with_answers`).

    Prompts of more than `max_prompt_length` tokens are left out, counted and logged; `limit` is how many
    prompts are kept at most. Raises DataError naming file and line of a prompt that is missing, blank or of
    another type, and when no prompt is left.
    """
    encoder = Encoder(tokenizer=tokenizer, apply_chat_template=apply_chat_template)
    prompts: list[Prompt] = []
    overlong: list[str] = []
    for row in dataset_rows(dataset_name):
        if len(prompts) == limit:
            break
        prompt = _prompt(row, encoder)
        if len(prompt.tokens) > max_prompt_length:
            overlong.append(row.where)
        else:
            prompts.append(prompt)
    num_rows = len(prompts) + len(overlong)
    warn_left_out(f"prompts of more than max_prompt_length={max_prompt_length} tokens", overlong, num_rows)
    if not prompts:
        raise DataError(
            f"{dataset_name}: none of {num_rows} prompts has at most max_prompt_length={max_prompt_length} "
            "tokens: raise max_prompt_length."
        )
    return PromptData(prompts=prompts, overlong=tuple(overlong))


def with_answers(columns: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The columns, with what is right under each of the names that reward functions ask for it by.

    These are `ground_truth` (verl), `answer` and `label`; verl's rows have it in `reward_model`. A row without any
    gets none. Two that are equal as texts (4 and "4") stay as they are. Raises DataError for two that differ.
    """
    nested = columns.get("reward_model")
    verl = nested.get("ground_truth") if isinstance(nested, Mapping) else None
    named = {"reward_model.ground_truth": verl, **{name: columns.get(name) for name in ANSWER_COLUMNS}}
    given = {name: value for name, value in named.items() if value not in (None, "")}
    if not given:
        return dict(columns)
    first, truth = next(iter(given.items()))
    for name, value in given.items():
        if value != truth and str(value).strip() != str(truth).strip():
            raise DataError(
                f"{where}: {first!r} is {shown(truth)} and {name!r} is {shown(value)}, but both are names of the "
                "right answer: rename or remove one."
            )
    return {**columns, **{name: given.get(name, truth) for name in ANSWER_COLUMNS}}


def _prompt(row: Row, encoder: Encoder) -> Prompt:
    columns = with_answers({key: value for key, value in row.values.items() if key != "prompt"}, row.where)
    value = _asked(row)
    if isinstance(value, str) and not encoder.apply_chat_template:
        tokens = encode(encoder.tokenizer, value, opening=True)
        return Prompt(tokens=tokens, text=value, columns=columns, where=row.where)
    asked = encoder.asked(value, row)
    check_asks(asked.messages, "prompt", row.where)
    text = asked.opening(encoder.tokenizer)
    tokens = encode(encoder.tokenizer, text)
    return Prompt(tokens=tokens, text=text, columns=columns, where=row.where, messages=asked.messages)


def _asked(row: Row) -> str | Messages:
    if not has(row, "prompt") and has(row, "chosen") and has(row, "rejected"):
        prompt, _, _ = split_pair(row)
        if prompt:
            return prompt
    if "prompt" not in row.values:
        raise missing(row, "prompt")
    return text_or_messages(row, "prompt")
