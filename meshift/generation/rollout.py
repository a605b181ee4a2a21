"""From a batch of prompts to a batch of completions: the task of a `generate` call.

It knows nothing of rewards or training; it packs what the engine drew under the keys that `training.readings`
and the algorithms read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from meshift.batch import Batch, Ragged
from meshift.counted import Count
from meshift.generation.engine import GenerationEngine
from meshift.generation.params import Completion, Request, SamplingParams

OnPart = Callable[[list[int], Batch], None]
"""Gets the numbers of some rows, and those rows."""


@dataclass(frozen=True, kw_only=True)
class SamplingTask:
    """How a step's completions are drawn. Sequence i of the run draws from the stream (seed, i)."""

    params: SamplingParams
    seed: int

    @property
    def support_keys(self) -> tuple[str, ...]:
        """Keys that say which tokens could have been drawn; none where every token could."""
        restricted = ("support", "support_counts") if self.params.truncates else ()
        early = ("num_stop_forbidden",) if self.params.min_new_tokens > 0 else ()
        return restricted + early


def rollout(
    engine: GenerationEngine,
    task: SamplingTask,
    batch: Batch,
    version: int,
    on_part: OnPart | None = None,
) -> Batch:
    """Complete every prompt of the batch with weights of the given version.

    Reads `prompts` and `index` (the sequence's number in the run, [1]); neighbouring rows with the same prompt
    share its prefill. Writes `tokens` (prompt and completion), `completion_lengths` [1], `logprobs`
    [completion], `truncated` [1] bool, `versions` [completion] (of the weights that drew each token), and the
    task's support keys. Completions are `counted`. `on_part` gets rows of that as they end, each once, with their
    numbers in the batch.
    """
    prompts = [row.tolist() for row in batch["prompts"].rows()]
    requests = [
        Request(tokens=tokens, index=index)
        for tokens, index in zip(prompts, batch["index"].values.tolist(), strict=True)
    ]
    rows = {request.index: row for row, request in enumerate(requests)}

    def pass_on(ended: list[Completion]) -> None:
        assert on_part is not None
        numbers = [rows[completion.index] for completion in ended]
        on_part(numbers, _packed([prompts[row] for row in numbers], ended, task, version))

    count = Count("completions", lambda: len(requests))
    completions = engine.generate_requests(
        requests,
        task.params,
        seed=task.seed,
        on_progress=lambda num_finished, num_tokens, live: count.to(num_finished),
        on_finished=None if on_part is None else pass_on,
    )
    count.end()
    return _packed(prompts, completions, task, version)


def _packed(
    prompts: Sequence[list[int]], completions: Sequence[Completion], task: SamplingTask, version: int
) -> Batch:
    sequences = [[*prompt, *c.tokens] for prompt, c in zip(prompts, completions, strict=True)]
    fields = {
        "tokens": Ragged.from_rows(sequences, torch.int64),
        "completion_lengths": Ragged.scalars([len(c.tokens) for c in completions], torch.int64),
        "logprobs": Ragged.from_rows([c.logprobs for c in completions], torch.float32),
        "truncated": Ragged.scalars([c.truncated for c in completions], torch.bool),
        "versions": Ragged.from_rows([[version] * len(c.tokens) for c in completions], torch.int64),
    }
    if "support" in task.support_keys:
        fields.update(_support(completions))
    if "num_stop_forbidden" in task.support_keys:
        fields["num_stop_forbidden"] = Ragged.scalars([c.num_stop_forbidden for c in completions], torch.int64)
    return Batch(fields)


def _support(completions: Sequence[Completion]) -> dict[str, Ragged]:
    """Allowed ids of every token, concatenated per sequence, and how many each token has."""
    per_row = [[torch.from_numpy(ids) for ids in c.support or []] for c in completions]
    counts = [[ids.numel() for ids in row] for row in per_row]
    return {
        "support": Ragged.from_rows([torch.cat(row) for row in per_row], torch.int32),
        "support_counts": Ragged.from_rows(counts, torch.int64),
    }
