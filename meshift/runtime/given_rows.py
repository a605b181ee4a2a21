"""What the runs on given rows (sft, reward, dpo) share: when held-out rows are due, what was
left out, and the lines of a dry run.

It knows nothing of what the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from meshift.config.runs import HeldOutRunConfig
from meshift.config.sections import TrainableConfig
from meshift.graph.calls import Kind
from meshift.runtime.models import check_trained
from meshift.runtime.run_folder import check_inputs_stay


def check_before_reading(config: HeldOutRunConfig, section: str, trained: TrainableConfig) -> None:
    """What can be found wrong before data is tokenised; `section` is the key that `trained` stands under."""
    check_inputs_stay(config, Path(config.output_dir))
    check_trained(section, str(trained.model_name_or_path), trained)


def held_out_due(config: HeldOutRunConfig, step: int, max_steps: int) -> bool:
    """Whether held-out rows are read after this step: every `eval_steps`, and at the end."""
    return step + 1 == max_steps or (config.eval_steps is not None and (step + 1) % config.eval_steps == 0)


def held_out_calls(config: HeldOutRunConfig, role: str) -> list[tuple[str, Kind]]:
    """The calls that a run makes of its role for held-out rows, if it has such."""
    return [(role, "infer")] if config.data.eval_dataset_name is not None else []


def left_out_notes(*left_out: tuple[Sequence[str], str]) -> list[str]:
    """A sentence for each kind of rows that were left out: where they stand, and what they are."""
    return [f"{len(at)} {which} were left out, the first at {at[0]}" for at, which in left_out if at]


def arithmetic(
    config: HeldOutRunConfig, sizes: Sequence[int], max_tokens: int, max_steps: int, what: str
) -> list[tuple[str, str]]:
    """Micro-batches and steps in words. `sizes` are the tokens of each row, `what` is their plural."""
    per_step = sum(sizes) / len(sizes) * config.data.batch_size
    passes = max_steps * config.data.batch_size / len(sizes)
    return [
        (
            "micro-batches",
            f"about {math.ceil(per_step / max_tokens)} of at most {max_tokens} tokens, over all data ranks",
        ),
        ("steps", f"{max_steps}, {passes:.2f} passes over the {what}"),
    ]
