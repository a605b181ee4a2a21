"""`meshift reward`: preference pairs to a reward model, with its accuracy on held-out pairs.

It knows nothing of the loss; it brings the data and the model to the graph of `algorithms/reward.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meshift.algorithms.losses import share_won
from meshift.algorithms.reward import reward_graph
from meshift.config.runs import RewardRunConfig
from meshift.data.preferences import Pair
from meshift.models.hf.save import save_model
from meshift.runtime.given_rows import arithmetic, check_before_reading, held_out_due
from meshift.runtime.models import (
    compute_dtype,
    model_folder,
    open_model,
    open_tokenizer,
    resident_bytes,
    shortest_limit,
)
from meshift.runtime.observer import Observer
from meshift.runtime.pairs import PairSets, PairSource, load_pairs, num_pair_tokens, pair_batch, weights_in_words
from meshift.runtime.role import LocalRole
from meshift.runtime.run import Job, RunResult, run_job, steps_of
from meshift.training.text_readings import PairScores


def run_reward(config: RewardRunConfig, observer: Observer) -> RunResult:
    """Train a reward model. Its folder `final/` loads with `AutoModelForSequenceClassification`."""
    return run_job(config, build_reward_job, observer)


def check_reward(config: RewardRunConfig) -> list[tuple[str, str]]:
    """Validate data and model and say what the run would do, without training."""
    data = _check(config)
    pairs = data.train.pairs
    sizes = [len(p.chosen) + len(p.rejected) for p in pairs]
    name, dtype = str(config.model.model_name_or_path), compute_dtype(config.dtype)
    memory = resident_bytes(name, "reward", dtype, config.model)
    return [
        ("model", str(model_folder(name))),
        ("compute type", str(dtype).removeprefix("torch.")),
        *data.described(),
        *weights_in_words(config.data, pairs),
        ("batch", f"{config.data.batch_size} pairs = {2 * config.data.batch_size} texts per update"),
        *arithmetic(config, sizes, config.model.max_tokens_per_micro_batch, steps_of(config, len(pairs)), "pairs"),
        ("memory", f"{memory / 1e9:.2f} GB for weights, gradients and optimizer"),
        ("output", config.output_dir),
    ]


def build_reward_job(config: RewardRunConfig) -> Job:
    """Model, data and graph."""
    data = _check(config)
    max_steps = steps_of(config, len(data.train.pairs))
    name = str(config.model.model_name_or_path)
    tokenizer = open_tokenizer(name)
    model = open_model(name, "reward", compute_dtype(config.dtype), seed=config.seed)
    role = LocalRole("reward", model, config.model, trainable=True, max_steps=max_steps, seed=config.seed)
    source = PairSource(config.data, data.train.pairs, config.seed)

    def evaluate(step: int) -> dict[str, float]:
        due = data.heldout is not None and held_out_due(config, step, max_steps)
        return heldout_metrics(role, data.heldout.pairs) if data.heldout and due else {}

    return Job(
        title=f"reward model from {len(data.train.pairs)} pairs",
        graph=reward_graph(config.reward),
        roles={"reward": role},
        max_steps=max_steps,
        next_batch=source.next_batch,
        save=lambda folder: _save(role, tokenizer, folder),
        evaluate=evaluate,
        num_tokens=num_pair_tokens,
        rows=data.train.pairs,
        messages=data.messages(),
    )


def heldout_metrics(role: LocalRole, pairs: Sequence[Pair]) -> dict[str, float]:
    """`eval/accuracy` (chosen scored above rejected; a tie is half) and `eval/margin`, all pairs alike."""
    scores = role.infer(PairScores(), pair_batch(pairs)).batch
    margin = scores["chosen_scores"].values - scores["rejected_scores"].values
    return {"eval/accuracy": float(share_won(margin).mean()), "eval/margin": float(margin.mean())}


def _check(config: RewardRunConfig) -> PairSets:
    """The data, when it and the model fit together; a dry run and a run both begin with it."""
    check_before_reading(config, "model", config.model)
    name = str(config.model.model_name_or_path)
    data = load_pairs(config.data, name)
    _, limit = shortest_limit({"reward": name})
    data.check_lengths("reward", name, limit)
    return data


def _save(role: LocalRole, tokenizer: object, folder: Path) -> None:
    save_model(role.model, folder, tokenizer=tokenizer)
