"""Prompts of a run: loaded, checked against what models take, and handed out step by step with their columns.

It knows nothing of roles, rewards or methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from meshift.batch import WHERE, Batch, Ragged, column_key
from meshift.config.runs import RolloutRunConfig
from meshift.data.loader import Loader
from meshift.data.prompts import Prompt, PromptData, load_prompts
from meshift.errors import DataError
from meshift.rewards.signatures import RESERVED_ARGUMENTS
from meshift.runtime.models import open_tokenizer, shortest_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


FURTHER_SEED = 1_000_003
"""Added to the run's seed, for the order of prompts that are drawn beyond a step's own."""
ROUND_DISTANCE = 2**40
"""Between the sequence numbers of two rounds of drawing: no run has as many sequences."""


class PromptSource:
    """Batches of prompts: each prompt `num_generations` times in a row, with its sequence numbers."""

    def __init__(self, config: RolloutRunConfig, prompts: Sequence[Prompt], columns: tuple[str, ...]) -> None:
        self.prompts = prompts
        self.columns = columns
        self.num_generations = config.generation.num_generations
        self.loader = Loader(len(prompts), config.data.batch_size, config.seed, config.data.shuffle)

    def next_batch(self, step: int) -> Batch:
        """The step's prompts. Sequence numbers count through the run, so no two sequences share a stream."""
        rows = self.loader.batch(step)
        return self.batch(rows, first=step * len(rows) * self.num_generations)

    def batch(self, rows: Sequence[int], first: int) -> Batch:
        """The named prompts, with sequence numbers from `first` on."""
        picked = [self.prompts[i] for i in rows for _ in range(self.num_generations)]
        fields = {
            "prompts": Ragged.from_rows([p.tokens for p in picked], torch.int64),
            "index": Ragged.scalars(list(range(first, first + len(picked))), torch.int64),
        }
        columns = {column_key(name): [_value(p, name) for p in picked] for name in self.columns}
        return Batch(fields, columns | {WHERE: [p.where for p in picked]})


class FurtherPrompts:
    """Prompts beyond those of a step's own batch, from a walk of its own over the same data.

    Every prompt comes in the steps' batches once per pass, whatever is drawn here. A checkpoint keeps the place in
    this walk.
    """

    def __init__(self, source: PromptSource, seed: int) -> None:
        self.source = source
        self.loader = Loader(len(source.prompts), 1, seed + FURTHER_SEED)
        self._step = -1
        self._used: set[int] = set()

    def __call__(self, step: int, round_number: int, count: int) -> Batch:
        """Rows of `count` prompts, none of which the step has had, as long as there are such.

        `round_number` counts from 1, and gives sequences streams that no other sequence of the run has.
        """
        if step != self._step:
            self._step, self._used = step, set(self.source.loader.batch(step))
        rows = [self._next() for _ in range(count)]
        size = self.source.loader.batch_size * self.source.num_generations
        return self.source.batch(rows, first=round_number * ROUND_DISTANCE + step * size)

    def _next(self) -> int:
        while (row := next(self.loader)[0]) in self._used and len(self._used) < len(self.source.prompts):
            continue
        self._used.add(row)
        return row

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.loader.load_state_dict(dict(state))


def _value(prompt: Prompt, column: str) -> Any:
    """What the data has in a column; of `prompt`, the text or the messages as they came."""
    if column == "prompt":
        return prompt.text if prompt.messages is None else prompt.messages
    return prompt.columns.get(column)


def reward_columns(config: RolloutRunConfig, data: PromptData) -> tuple[str, ...]:
    """The data's columns that reward functions are given. Raises `DataError` for a name that is taken."""
    if not (config.reward.functions or config.cost_functions):
        return ()
    names = {key for prompt in data.prompts for key in prompt.columns}
    for name in RESERVED_ARGUMENTS:
        if name in names:
            raise DataError(
                f"{config.data.dataset_name}: the column {name!r} is reserved, since every reward function is "
                "given an argument of that name: rename the column."
            )
    return ("prompt", *sorted(names))


def load_data(config: RolloutRunConfig, tokenizer: PreTrainedTokenizerFast) -> PromptData:
    """The run's prompts, as tokens."""
    data = config.data
    return load_prompts(
        data.dataset_name,
        tokenizer,
        max_prompt_length=data.max_prompt_length,
        apply_chat_template=data.apply_chat_template,
    )


def load_rows(config: RolloutRunConfig) -> list[Prompt]:
    """The run's prompts, by the actor's tokenizer."""
    return load_data(config, open_tokenizer(str(config.actor.model_name_or_path))).prompts


def check_lengths(config: RolloutRunConfig, names: Mapping[str, str], data: PromptData) -> None:
    """Raise `DataError` for the first prompt that with a full completion is longer than some model's positions."""
    role, limit = shortest_limit(names)
    new = config.generation.max_completion_length
    for prompt in data.prompts:
        num_tokens = len(prompt.tokens)
        if num_tokens + new > limit:
            raise DataError(
                f"{prompt.where}: the prompt's {num_tokens} tokens and generation.max_completion_length = {new} "
                f"make {num_tokens + new}, but the {role} model {names[role]} takes {limit}: lower one of "
                "data.max_prompt_length and generation.max_completion_length."
            )


def left_out(data: PromptData, what: str) -> str:
    """How many prompts are too long, and where the first stands; `what` they are goes into the sentence."""
    first = f", the first at {data.overlong[0]}" if data.overlong else ""
    return f"{data.num_overlong} {what}over data.max_prompt_length left out{first}"
