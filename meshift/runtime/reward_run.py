"""`meshift reward`: preference pairs to a reward model, with its accuracy on held-out pairs.

It knows nothing of the loss; it brings the data and the model to the graph of `algorithms/reward.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from meshift.algorithms.reward import reward_graph
from meshift.batch import Batch, Ragged
from meshift.config.runs import RewardRunConfig
from meshift.data.loader import Loader
from meshift.data.preferences import Pair, PreferenceData, load_preferences
from meshift.errors import ConfigError
from meshift.models.hf.save import save_model
from meshift.runtime.models import (
    check_frozen_layers,
    compute_dtype,
    model_folder,
    open_model,
    open_tokenizer,
    resident_bytes,
    shortest_limit,
)
from meshift.runtime.observer import Observer
from meshift.runtime.role import LocalRole
from meshift.runtime.run import Job, RunResult, run_job, steps_of
from meshift.runtime.run_folder import check_inputs_stay
from meshift.training.readings import PairScores


def run_reward(config: RewardRunConfig, observer: Observer) -> RunResult:
    """Train a reward model. Its folder `final/` loads with `AutoModelForSequenceClassification`."""
    return run_job(config, build_reward_job, observer)


def check_reward(config: RewardRunConfig) -> list[tuple[str, str]]:
    """Validate data and model and say what the run would do, without training."""
    data, heldout = _check(config)
    max_steps = steps_of(config, len(data.pairs))
    tokens = [len(p.chosen) + len(p.rejected) for p in data.pairs]
    per_step = sum(tokens) / len(tokens) * config.data.batch_size
    dtype = compute_dtype(config.dtype)
    memory = resident_bytes(str(config.model.model_name_or_path), "reward", dtype, config.model)
    budget = config.model.max_tokens_per_micro_batch
    return [
        ("model", str(model_folder(str(config.model.model_name_or_path)))),
        ("compute type", str(dtype).removeprefix("torch.")),
        ("pairs", _counted(data)),
        ("held-out pairs", _counted(heldout) if heldout else "none"),
        ("batch", f"{config.data.batch_size} pairs = {2 * config.data.batch_size} texts per update"),
        (
            "micro-batches",
            f"about {max(1, round(per_step / budget + 0.5))} of at most {budget} tokens, 1 data rank",
        ),
        (
            "steps",
            f"{max_steps}, {max_steps * config.data.batch_size / len(data.pairs):.2f} passes over the pairs",
        ),
        ("memory", f"{memory / 1e9:.2f} GB for weights, gradients and optimizer"),
        ("output", config.output_dir),
    ]


def build_reward_job(config: RewardRunConfig) -> Job:
    """Model, data and graph."""
    data, heldout = _check(config)
    max_steps = steps_of(config, len(data.pairs))
    name = str(config.model.model_name_or_path)
    tokenizer = open_tokenizer(name)
    model = open_model(name, "reward", compute_dtype(config.dtype), seed=config.seed)
    role = LocalRole("reward", model, config.model, trainable=True, max_steps=max_steps, seed=config.seed)
    loader = Loader(len(data.pairs), config.data.batch_size, config.seed, config.data.shuffle)

    def next_batch(step: int) -> Batch:
        return pair_batch([data.pairs[i] for i in loader.batch(step)])

    def evaluate(step: int) -> dict[str, float]:
        last = step + 1 == max_steps
        due = config.eval_steps is not None and (step + 1) % config.eval_steps == 0
        return heldout_metrics(role, heldout.pairs) if heldout and (last or due) else {}

    return Job(
        title=f"reward model from {len(data.pairs)} pairs",
        graph=reward_graph(),
        roles={"reward": role},
        max_steps=max_steps,
        next_batch=next_batch,
        save=lambda folder: _save(role, tokenizer, folder),
        evaluate=evaluate,
        num_tokens=lambda batch: sum(int(batch[key].lengths.sum()) for key in ("chosen", "rejected")),
        messages=(*_messages(data, "pairs"), *(_messages(heldout, "held-out pairs") if heldout else ())),
    )


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """Pairs as the keys `chosen` and `rejected`."""
    return Batch(
        {
            "chosen": Ragged.from_rows([p.chosen for p in pairs], torch.int64),
            "rejected": Ragged.from_rows([p.rejected for p in pairs], torch.int64),
        }
    )


def heldout_metrics(role: LocalRole, pairs: Sequence[Pair]) -> dict[str, float]:
    """`eval/accuracy` (chosen scored above rejected; a tie is half) and `eval/margin`."""
    scores = role.infer(PairScores(), pair_batch(pairs)).batch
    margin = scores["chosen_scores"].values - scores["rejected_scores"].values
    accuracy = (margin > 0).float() + 0.5 * (margin == 0).float()
    return {"eval/accuracy": float(accuracy.mean()), "eval/margin": float(margin.mean())}


def _load_data(config: RewardRunConfig) -> tuple[PreferenceData, PreferenceData | None]:
    tokenizer = open_tokenizer(str(config.model.model_name_or_path))
    load = partial(
        load_preferences,
        tokenizer=tokenizer,
        max_length=config.data.max_length,
        append_eos=config.data.append_eos,
    )
    name = config.data.eval_dataset_name
    heldout = load(name) if name else None
    if heldout is not None:
        heldout = replace(heldout, pairs=heldout.pairs[: config.data.max_eval_samples])
    return load(config.data.dataset_name), heldout


def _check(config: RewardRunConfig) -> tuple[PreferenceData, PreferenceData | None]:
    """The data, when it and the model fit together; a dry run and a run both begin with it."""
    check_inputs_stay(config, Path(config.output_dir))
    name = str(config.model.model_name_or_path)
    check_frozen_layers("model", name, config.model)
    data, heldout = _load_data(config)
    _, limit = shortest_limit({"reward": name})
    for pair in (*data.pairs, *(heldout.pairs if heldout else ())):
        longest = max(len(pair.chosen), len(pair.rejected))
        if longest > limit:
            raise ConfigError(
                f"the pair at {pair.where} has a text of {longest} tokens, but the model {name} takes {limit}; "
                f"set `data.max_length` to at most {limit}"
            )
    return data, heldout


def _counted(data: PreferenceData) -> str:
    return f"{len(data.pairs)} ({data.num_overlong} over-long and {data.num_identical} identical left out)"


def _messages(data: PreferenceData, what: str) -> tuple[str, ...]:
    notes = []
    if data.overlong:
        notes.append(
            f"{data.num_overlong} {what} over data.max_length were left out, the first at {data.overlong[0]}"
        )
    if data.identical:
        notes.append(
            f"{data.num_identical} {what} with equal texts were left out, the first at {data.identical[0]}"
        )
    return tuple(notes)


def _save(role: LocalRole, tokenizer: object, folder: Path) -> None:
    save_model(role.model, folder, tokenizer=tokenizer)
