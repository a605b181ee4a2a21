"""What reward functions may be told of a step's completions, in plain Python values, one per sample.

It knows nothing of tensors, nor of which function is given what.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NUM_SHOWN = 60  # characters of a completion that an error quotes


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Completions and what belongs to them; every list has one item per sample.

    `prompts` and `completions` are as the data has them (texts, or lists of messages). `texts` are the completions
    as plain text. `prompt_texts` and `queries` (prompt and completion) keep special tokens, and each query begins
    with its prompt. `columns` are the data's, without `prompt`; `where` is "path:line", or empty. `step` counts
    from 0, of `max_steps`.
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    texts: list[str]
    prompt_texts: list[str]
    queries: list[str]
    columns: dict[str, list[Any]]
    where: list[str]
    step: int = 0
    max_steps: int = 0

    def __len__(self) -> int:
        return len(self.completion_ids)

    def pick(self, rows: Sequence[int]) -> Samples:
        """The named samples, in the order given."""
        return Samples(
            prompts=[self.prompts[i] for i in rows],
            completions=[self.completions[i] for i in rows],
            completion_ids=[self.completion_ids[i] for i in rows],
            texts=[self.texts[i] for i in rows],
            prompt_texts=[self.prompt_texts[i] for i in rows],
            queries=[self.queries[i] for i in rows],
            columns={name: [values[i] for i in rows] for name, values in self.columns.items()},
            where=[self.where[i] for i in rows],
            step=self.step,
            max_steps=self.max_steps,
        )

    def name(self, index: int) -> str:
        """A sample in an error: `sample 3 (prompts.jsonl:7), completion 'the film was'`."""
        where = f" ({self.where[index]})" if self.where[index] else ""
        text = self.texts[index]
        shown = text if len(text) <= NUM_SHOWN else text[:NUM_SHOWN] + "..."
        return f"sample {index}{where}, completion {shown!r}"
