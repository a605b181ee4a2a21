"""What the runs on given rows (sft, reward, dpo and kin) share: how rows are read, when held-out ones are due,
what was left out, the roles that they align, and the lines of a dry run.

It knows nothing of what the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from meshift.config.runs import DPORunConfig, HeldOutRunConfig, KTORunConfig
from meshift.config.sections import DemonstrationDataConfig, PairDataConfig, TrainableConfig, UnpairedDataConfig
from meshift.graph.calls import Kind
from meshift.runtime.models import (
    check_same_shape,
    check_same_tokenizer,
    check_trained,
    compute_dtype,
    open_tokenizer,
    stop_token_ids,
    trained_rows,
)
from meshift.runtime.planned_run import Method, plan_row
from meshift.runtime.role_spec import RoleSpec, frozen_like
from meshift.runtime.run import steps_of
from meshift.runtime.run_folder import check_inputs_stay

D = TypeVar("D")


def check_before_reading(config: HeldOutRunConfig, section: str, trained: TrainableConfig) -> None:
    """What can be found wrong before data is tokenised; `section` is the key that `trained` stands under."""
    check_inputs_stay(config, Path(config.output_dir))
    check_trained(section, str(trained.model_name_or_path), trained)


def loaded_rows(
    load: Callable[..., D],
    config: DemonstrationDataConfig | PairDataConfig | UnpairedDataConfig,
    model: str,
    **more: Any,
) -> tuple[D, D | None]:
    """The rows to train on and those held out, if any, by a loader of `data/`, tokenised for the model."""
    tokenizer = open_tokenizer(model)
    read = partial(
        load,
        tokenizer=tokenizer,
        max_length=config.max_length,
        append_eos=config.append_eos,
        apply_chat_template=config.apply_chat_template,
        stop_token_ids=stop_token_ids(model, tokenizer),
        **more,
    )
    heldout = read(config.eval_dataset_name) if config.eval_dataset_name else None
    return read(config.dataset_name), heldout


def actor_spec(config: HeldOutRunConfig, trained: TrainableConfig, max_steps: int) -> RoleSpec:
    """The language model that the run trains."""
    return RoleSpec(
        name="actor",
        model=str(trained.model_name_or_path),
        dtype=compute_dtype(config.dtype),
        config=trained,
        max_steps=max_steps,
        seed=config.seed,
    )


def reference_spec(config: DPORunConfig | KTORunConfig) -> RoleSpec:
    """The model that the actor is held against."""
    return RoleSpec(
        name="reference",
        model=actor_and_reference(config)["reference"],
        dtype=compute_dtype(config.dtype),
        config=frozen_like(config.actor),
        moves=config.reference.sync_ref_model,
    )


def actor_and_reference(config: DPORunConfig | KTORunConfig) -> dict[str, str]:
    """The model that each role starts from: the reference from the actor."""
    actor = str(config.actor.model_name_or_path)
    return {"actor": actor, "reference": config.reference.model_name_or_path or actor}


def check_actor_and_reference(config: DPORunConfig | KTORunConfig) -> dict[str, str]:
    """Their models, when these fit together: before data is tokenised."""
    check_before_reading(config, "actor", config.actor)
    names = actor_and_reference(config)
    check_same_tokenizer(names)
    if config.reference.sync_ref_model:
        check_same_shape(names["actor"], names["reference"], "reference.sync_ref_model mixes them")
    return names


def held_out_due(config: HeldOutRunConfig, step: int, max_steps: int) -> bool:
    """Whether held-out rows are read after this step: every `eval_steps`, and at the end."""
    return step + 1 == max_steps or (config.eval_steps is not None and (step + 1) % config.eval_steps == 0)


def held_out_calls(config: HeldOutRunConfig, role: str) -> list[tuple[str, Kind]]:
    """The calls that a run makes of its role for held-out rows, if it has such."""
    return [(role, "infer")] if config.data.eval_dataset_name is not None else []


def left_out_notes(*left_out: tuple[Sequence[str], str]) -> list[str]:
    """A sentence for each kind of rows that were left out: where they stand, and what they are."""
    return [f"{len(at)} {which} were left out, the first at {at[0]}" for at, which in left_out if at]


def closing_rows(
    config: HeldOutRunConfig,
    method: Method,
    sizes: Sequence[int],
    what: str,
    *,
    names: Mapping[str, str],
    trained: Mapping[str, TrainableConfig],
    memory: int,
) -> list[tuple[str, str]]:
    """How a dry run ends: micro-batches and steps, what is trained, bytes that are kept, the folder, the plan.

    `sizes` are the tokens of each row, `what` is their plural; `trained` is the one role that learns.
    """
    (role,) = trained
    max_tokens, max_steps = trained[role].max_tokens_per_micro_batch, steps_of(config, len(sizes))
    per_step = sum(sizes) / len(sizes) * config.data.batch_size
    passes = max_steps * config.data.batch_size / len(sizes)
    return [
        (
            "micro-batches",
            f"about {math.ceil(per_step / max_tokens)} of at most {max_tokens} tokens, over all data ranks",
        ),
        ("steps", f"{max_steps}, {passes:.2f} passes over the {what}"),
        *trained_rows(names, trained),
        ("memory", f"{memory / 1e9:.2f} GB for weights, gradients and optimizer"),
        ("output", config.output_dir),
        *plan_row(config, method),
    ]
