"""Worlds of tiny models whose completions are drawn ahead of their step."""

import torch

from meshift.batch import Batch, Ragged
from meshift.graph.ahead import halves_of
from meshift.runtime.ahead import AheadStep, Queue


def ahead_of(world, prompts, max_staleness, max_steps):
    """A world's steps on the same prompts, drawn ahead."""

    def next_batch(step):
        rows = [prompt for prompt in prompts for _ in range(getattr(world, "num_generations", 1))]
        first = step * len(rows)
        return Batch(
            {
                "prompts": Ragged.from_rows(rows, torch.int64),
                "index": Ragged.scalars(list(range(first, first + len(rows))), torch.int64),
            }
        )

    step = AheadStep(
        halves=halves_of(world.graph),
        roles=world.roles,
        queue=Queue(max_staleness, max_steps),
        next_batch=next_batch,
    )
    return lambda number: step.run(next_batch(number), number)
