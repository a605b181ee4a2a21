"""`meshift reward`: preference pairs to a reward model, with its accuracy on held-out pairs.

It knows nothing of the loss, nor of how many processes run it; it brings data and model to the
graph of `algorithms/reward.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshift.algorithms.losses import share_won
from meshift.algorithms.reward import reward_graph
from meshift.config.runs import RewardRunConfig
from meshift.data.preferences import Pair
from meshift.runtime.fixed_samples import Infers
from meshift.runtime.given_rows import check_before_reading, closing_rows, held_out_calls, held_out_due
from meshift.runtime.models import (
    compute_dtype,
    model_folder,
    open_tokenizer,
    resident_bytes,
    shortest_limit,
)
from meshift.runtime.observer import Observer
from meshift.runtime.pairs import PairSets, PairSource, load_pairs, num_pair_tokens, pair_batch, weights_in_words
from meshift.runtime.planned_run import Method, start_run
from meshift.runtime.plans import Uses, uses_of
from meshift.runtime.role_spec import LocalOpener, Opener, RoleSpec, save_role
from meshift.runtime.run import Job, RunResult, steps_of
from meshift.training.text_readings import PairScores


def run_reward(config: RewardRunConfig, observer: Observer) -> RunResult:
    """Train a reward model. Its folder `final/` loads with `AutoModelForSequenceClassification`."""
    return start_run(config, REWARD_METHOD, observer)


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
        *closing_rows(
            config,
            REWARD_METHOD,
            sizes,
            "pairs",
            names=_models(config),
            trained={"reward": config.model},
            memory=memory,
        ),
    ]


def build_reward_job(config: RewardRunConfig, opener: Opener | None = None) -> Job:
    """Model, data and graph. Without an opener the model is in this process."""
    data = _check(config)
    max_steps = steps_of(config, len(data.train.pairs))
    name = str(config.model.model_name_or_path)
    tokenizer = open_tokenizer(name)
    spec = RoleSpec(
        name="reward",
        model=name,
        head="reward",
        dtype=compute_dtype(config.dtype),
        config=config.model,
        max_steps=max_steps,
        seed=config.seed,
        head_seed=config.seed,
    )
    role = (opener or LocalOpener(None, config.plan.offloaded)).open(spec)
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
        save=lambda folder: save_role(role, folder, tokenizer),
        evaluate=evaluate,
        num_tokens=num_pair_tokens,
        rows=data.train.pairs,
        messages=data.messages(),
    )


def reward_uses(config: RewardRunConfig) -> Uses:
    """The calls of the model."""
    return uses_of(reward_graph(config.reward), *held_out_calls(config, "reward"))


def _models(config: RewardRunConfig) -> dict[str, str]:
    return {"reward": str(config.model.model_name_or_path)}


def _rows(config: RewardRunConfig) -> list[Pair]:
    return _check(config).train.pairs


REWARD_METHOD = Method(build=build_reward_job, uses=reward_uses, models=_models, rows=_rows)


def heldout_metrics(role: Infers, pairs: Sequence[Pair]) -> dict[str, float]:
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
