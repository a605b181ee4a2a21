"""Prompts for generation: a file's rows, tokenised, with the other columns kept for reward functions.

It knows nothing of sampling, rewards or batches.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from meshift.data.chat import Messages, check_messages, encode, render
from meshift.data.dataset import dataset_rows, warn_left_out
from meshift.data.rows import Row
from meshift.errors import DataError


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
    dataset_name: str, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int, limit: int | None = None
) -> PromptData:
    """Read and tokenise the column `prompt` (a text, tokenised as it is, or messages, by the chat template).

    Prompts of more than `max_prompt_length` tokens are left out, counted and logged; `limit` is how many
    prompts are kept at most. Raises DataError naming file and line of a prompt that is missing, blank or of
    another type, and when no prompt is left.
    """
    rows = dataset_rows(dataset_name)
    prompts: list[Prompt] = []
    overlong: list[str] = []
    for row in rows:
        if len(prompts) == limit:
            break
        prompt = _prompt(row, tokenizer)
        if len(prompt.tokens) > max_prompt_length:
            overlong.append(row.where)
        else:
            prompts.append(prompt)
    warn_left_out(f"prompts of more than max_prompt_length={max_prompt_length} tokens", overlong, len(rows))
    if not prompts:
        raise DataError(
            f"{dataset_name}: none of {len(rows)} prompts has at most max_prompt_length={max_prompt_length} "
            "tokens: raise max_prompt_length."
        )
    return PromptData(prompts=prompts, overlong=tuple(overlong))


def _prompt(row: Row, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    columns = {key: value for key, value in row.values.items() if key != "prompt"}
    if "prompt" not in row.values:
        raise DataError(f"{row.where}: the column 'prompt' is missing; the row has {sorted(columns)}.")
    value = row.values["prompt"]
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{row.where}: 'prompt' is blank: give it a text or remove the row.")
        tokens = encode(tokenizer, value, opening=True)
        return Prompt(tokens=tokens, text=value, columns=columns, where=row.where)
    messages = check_messages(value, "prompt", row.where)
    text = render(tokenizer, messages, row.where, add_generation_prompt=True)
    return Prompt(tokens=encode(tokenizer, text), text=text, columns=columns, where=row.where, messages=messages)
