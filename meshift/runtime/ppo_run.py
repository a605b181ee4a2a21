"""`meshift ppo`: four roles, prompts and rewards brought to the graph of `algorithms/ppo.py`.

It knows nothing of the objective itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meshift.algorithms.ppo import PPO
from meshift.batch import Batch, Outcome, Ragged
from meshift.config import PPORunConfig, TrainableConfig
from meshift.data.loader import Loader
from meshift.data.prompts import Prompt, PromptData, load_prompts
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.models.config import HeadKind
from meshift.models.hf.save import save_model
from meshift.rewards.functions import RewardFunctions, load_functions
from meshift.runtime.models import (
    check_reward_model,
    check_same_shape,
    check_same_tokenizer,
    compute_dtype,
    model_folder,
    open_model,
    open_tokenizer,
    resident_bytes,
    stop_token_ids,
)
from meshift.runtime.observer import Observer
from meshift.runtime.role import LocalRole
from meshift.runtime.run import Job, RunResult, run_job, steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RESERVED_COLUMNS = ("prompt", "prompts", "completions", "completion_ids")


def run_ppo(config: PPORunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return run_job(config, build_ppo_job, observer)


def check_ppo(config: PPORunConfig) -> list[tuple[str, str]]:
    """Validate data, models and reward functions and say what the run would do, without training."""
    names = role_models(config)
    load_functions(config.reward.functions)
    _check_models(config, names)
    tokenizer = open_tokenizer(names["actor"])
    data = _load_data(config, tokenizer)
    max_steps = steps_of(config, len(data.prompts))
    sequences = config.data.batch_size * config.generation.num_generations
    updates = config.ppo.num_mini_batches
    longest = max(len(p.tokens) for p in data.prompts) + config.generation.max_completion_length
    budget = config.actor.max_tokens_per_micro_batch
    return [
        *((f"{role} model", str(model_folder(name))) for role, name in names.items()),
        ("compute type", str(compute_dtype(config.dtype)).removeprefix("torch.")),
        ("prompts", f"{len(data.prompts)} ({data.num_overlong} over data.max_prompt_length left out)"),
        (
            "batch",
            f"{config.data.batch_size} prompts x {config.generation.num_generations} generations = {sequences} "
            f"sequences -> {config.ppo.num_ppo_epochs} x {updates} updates of {sequences / updates:g} sequences",
        ),
        (
            "micro-batches",
            f"at most {budget} tokens on 1 data rank; up to {sequences * longest // updates} tokens an update",
        ),
        (
            "steps",
            f"{max_steps}, {max_steps * config.data.batch_size / len(data.prompts):.2f} passes over the prompts",
        ),
        ("memory", f"{_resident_bytes(config, names) / 1e9:.2f} GB for weights, gradients and optimizers"),
        ("output", config.output_dir),
    ]


def _resident_bytes(config: PPORunConfig, names: dict[str, str]) -> int:
    heads: dict[str, HeadKind] = {"actor": "lm", "critic": "value", "reference": "lm", "reward": "reward"}
    trained = {"actor": config.actor, "critic": config.critic}
    dtype = compute_dtype(config.dtype)
    return sum(resident_bytes(model, heads[role], dtype, trained.get(role)) for role, model in names.items())


def role_models(config: PPORunConfig) -> dict[str, str]:
    """The model that each role starts from: the reference from the actor, the critic from the reward model."""
    actor = str(config.actor.model_name_or_path)
    reward = config.reward.model_name_or_path
    names = {
        "actor": actor,
        "critic": config.critic.model_name_or_path or reward or actor,
        "reference": config.reference.model_name_or_path or actor,
    }
    return names | ({"reward": reward} if reward is not None else {})


def _check_models(config: PPORunConfig, names: dict[str, str]) -> None:
    if "reward" in names:
        check_reward_model(names["reward"])
    check_same_tokenizer(names)
    if config.reference.sync_ref_model:
        check_same_shape(names["actor"], names["reference"], "reference.sync_ref_model mixes them")


def build_ppo_job(config: PPORunConfig) -> Job:
    """Roles, prompts, rewards and graph."""
    names = role_models(config)
    _check_models(config, names)
    tokenizer = open_tokenizer(names["actor"])
    data = _load_data(config, tokenizer)
    max_steps = steps_of(config, len(data.prompts))
    texts = _Texts(tokenizer)
    sampling = sampling_task(config, stop_token_ids(names["actor"], tokenizer))
    columns = tuple(sorted({key for prompt in data.prompts for key in prompt.columns} - set(RESERVED_COLUMNS)))
    functions = _reward_functions(config, texts, columns)
    algorithm = PPO(config, sampling)
    roles = _roles(config, names, max_steps, texts)
    source = _PromptSource(config, data.prompts, columns)
    return Job(
        title=f"PPO on {len(data.prompts)} prompts",
        graph=algorithm.graph(functions, (*columns, "prompt") if functions else ()),
        roles=roles,
        max_steps=max_steps,
        next_batch=source.next_batch,
        save=lambda folder: _save(roles, tokenizer, folder),
        samples=lambda step, batch: texts.samples(step, batch, config.num_logged_samples),
        messages=(f"{data.num_overlong} prompts over data.max_prompt_length were left out",)
        if data.overlong
        else (),
    )


@dataclass(frozen=True)
class _Texts:
    """Token ids back to texts, for rewards, stop strings and the log of samples."""

    tokenizer: PreTrainedTokenizerFast

    def decode(self, tokens: list[int]) -> str:
        """The text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def samples(self, step: int, batch: Batch, count: int) -> list[dict[str, Any]]:
        """The first completions of a step, as rows of samples.jsonl."""
        rows = []
        for i, tokens in enumerate(batch["tokens"].rows()[:count]):
            length = int(batch["completion_lengths"].values[i])
            rows.append(
                {
                    "step": step + 1,
                    "index": int(batch["index"].values[i]),
                    "prompt": self.decode(tokens[: len(tokens) - length].tolist()),
                    "completion": self.decode(tokens[len(tokens) - length :].tolist()),
                    "reward": float(batch["scores"].values[i]),
                    "truncated": bool(batch["truncated"].values[i]),
                }
            )
        return rows


class _PromptSource:
    """Batches of prompts: each prompt `num_generations` times in a row, with its sequence numbers."""

    def __init__(self, config: PPORunConfig, prompts: Sequence[Prompt], columns: tuple[str, ...]) -> None:
        self.prompts = prompts
        self.columns = columns
        self.num_generations = config.generation.num_generations
        self.loader = Loader(len(prompts), config.data.batch_size, config.seed, config.data.shuffle)

    def next_batch(self, step: int) -> Batch:
        """The step's prompts. Sequence numbers count through the run, so no two sequences share a stream."""
        picked = [self.prompts[i] for i in next(self.loader) for _ in range(self.num_generations)]
        first = step * len(picked)
        fields = {
            "prompts": Ragged.from_rows([p.tokens for p in picked], torch.int64),
            "index": Ragged.scalars(list(range(first, first + len(picked))), torch.int64),
        }
        columns: dict[str, list[Any]] = {key: [p.columns.get(key) for p in picked] for key in self.columns}
        columns["prompt"] = [p.text for p in picked]
        return Batch(fields, columns)


def _load_data(config: PPORunConfig, tokenizer: PreTrainedTokenizerFast) -> PromptData:
    return load_prompts(config.data.dataset_name, tokenizer, max_prompt_length=config.data.max_prompt_length)


def sampling_task(config: PPORunConfig, stops: tuple[int, ...]) -> SamplingTask:
    """How the run's completions are drawn."""
    generation = config.generation
    params = SamplingParams(
        max_new_tokens=generation.max_completion_length,
        min_new_tokens=generation.min_new_tokens,
        temperature=generation.temperature,
        top_k=generation.top_k,
        top_p=generation.top_p,
        stop_token_ids=stops,
        stop_strings=tuple(generation.stop_strings),
    )
    return SamplingTask(params=params, seed=config.seed)


def _reward_functions(
    config: PPORunConfig, texts: _Texts, columns: tuple[str, ...]
) -> Callable[[Batch], Outcome] | None:
    if not config.reward.functions:
        return None
    functions = load_functions(config.reward.functions)
    return RewardFunctions(functions=functions, decode=texts.decode, columns=(*columns, "prompt"))


def _roles(config: PPORunConfig, names: dict[str, str], max_steps: int, texts: _Texts) -> dict[str, LocalRole]:
    dtype = compute_dtype(config.dtype)
    frozen = TrainableConfig(
        max_tokens_per_micro_batch=config.actor.max_tokens_per_micro_batch, logits_chunk=config.actor.logits_chunk
    )
    trained = partial(LocalRole, trainable=True, max_steps=max_steps)
    actor = trained("actor", open_model(names["actor"], "lm", dtype), config.actor, seed=config.seed)
    value_model = open_model(names["critic"], "value", dtype)
    if config.critic.new_value_head:
        value_model.head.weight.data.zero_()  # type: ignore[operator]
    critic = trained("critic", value_model, config.critic, seed=config.seed + 1)
    roles = {
        "actor": actor.can_generate(config.generation.num_slots, texts.decode),
        "critic": critic,
        "reference": LocalRole("reference", open_model(names["reference"], "lm", dtype), frozen),
    }
    if "reward" in names:
        roles["reward"] = LocalRole("reward", open_model(names["reward"], "reward", dtype), frozen)
    return roles


def _save(roles: dict[str, LocalRole], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_model(roles["actor"].model, folder, tokenizer=tokenizer)
    save_model(roles["critic"].model, folder.with_name("final_critic"), tokenizer=tokenizer)
