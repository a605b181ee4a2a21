"""What the last pipeline stage draws, told to the other stages, so that all keep the same books.

It knows nothing of schedules or of how tokens are drawn.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch

from meshift.errors import NonFiniteError
from meshift.generation.params import SamplingParams
from meshift.generation.sampler import Draw
from meshift.parallel.pipeline import Stages

MAX_TEXT = 1024
"""Bytes of a sentence about a draw that failed."""


def tell_draw(stages: Stages, draw: Draw) -> None:
    """Send a draw to the other stages. Token ids are exact in fp64."""
    counts = [len(ids) for ids in draw.support or ()]
    stages.tell(torch.tensor([0.0, *draw.tokens, *draw.logprobs, *counts], dtype=torch.float64))
    if counts:
        stages.tell(torch.cat([torch.from_numpy(ids).to(torch.int64) for ids in draw.support or ()]))


def tell_trouble(stages: Stages, error: NonFiniteError, num_rows: int, params: SamplingParams) -> None:
    """Let the other stages fail with the same sentence, in the place of a draw of so many rows."""
    text = str(error).encode()[:MAX_TEXT]
    numbers = torch.zeros(_num_numbers(num_rows, params), dtype=torch.float64)
    numbers[0] = len(text)
    stages.tell(numbers)
    stages.tell(torch.tensor([*text, *[0] * (MAX_TEXT - len(text))], dtype=torch.uint8))
    stages.finish()


def hear_draw(stages: Stages, num_rows: int, params: SamplingParams) -> Draw:
    """What the last stage drew for so many rows. Raises its `NonFiniteError`."""
    numbers = stages.hear(torch.empty(_num_numbers(num_rows, params), dtype=torch.float64))
    trouble, numbers = int(numbers[0]), numbers[1:]
    if trouble:
        text = stages.hear(torch.empty(MAX_TEXT, dtype=torch.uint8))
        raise NonFiniteError(text[:trouble].numpy().tobytes().decode(errors="replace"))
    tokens, logprobs, counts = numbers[:num_rows], numbers[num_rows : 2 * num_rows], numbers[2 * num_rows :]
    support = None
    if params.truncates:
        sizes = [int(count) for count in counts]
        ids = stages.hear(torch.empty(sum(sizes), dtype=torch.int64)).to(torch.int32).numpy()
        support = [ids[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]
    return Draw(tokens=tokens.long().tolist(), logprobs=logprobs.tolist(), support=support)


def _num_numbers(num_rows: int, params: SamplingParams) -> int:
    """What is told of a draw, but for the ids of its support."""
    return 1 + num_rows * (3 if params.truncates else 2)
