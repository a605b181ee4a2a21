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
from meshift.batch import Batch, Outcome, Ragged, column_key
from meshift.config.runs import PPORunConfig
from meshift.config.sections import TrainableConfig
from meshift.data.loader import Loader
from meshift.data.prompts import Prompt, PromptData, load_prompts
from meshift.errors import DataError
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.models.config import HeadKind
from meshift.models.hf.save import save_model
from meshift.rewards.configured import check_columns, describe_functions, load_functions
from meshift.rewards.functions import WHERE, RewardFunctions, WeightedFunction
from meshift.rewards.signatures import RESERVED_ARGUMENTS
from meshift.runtime.fixed_samples import FixedSamples, sampled_steps
from meshift.runtime.models import (
    check_frozen_layers,
    check_reward_model,
    check_same_shape,
    check_same_tokenizer,
    compute_dtype,
    model_folder,
    open_model,
    open_tokenizer,
    resident_bytes,
    shortest_limit,
    stop_token_ids,
)
from meshift.runtime.observer import Observer
from meshift.runtime.role import LocalRole
from meshift.runtime.run import Job, RunResult, run_job, steps_of
from meshift.runtime.run_folder import check_inputs_stay

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def run_ppo(config: PPORunConfig, observer: Observer) -> RunResult:
    """Align the actor. Its folder `final/` loads with `AutoModelForCausalLM`."""
    return run_job(config, build_ppo_job, observer)


def check_ppo(config: PPORunConfig) -> list[tuple[str, str]]:
    """Validate data, models and reward functions and say what the run would do, without training."""
    checked = _check(config)
    data, names, max_steps = checked.data, checked.names, checked.max_steps
    sequences = config.data.batch_size * config.generation.num_generations
    updates = config.ppo.num_mini_batches
    longest = max(len(p.tokens) for p in data.prompts) + config.generation.max_completion_length
    budget = config.actor.max_tokens_per_micro_batch
    return [
        *((f"{role} model", str(model_folder(name))) for role, name in names.items()),
        ("compute type", str(compute_dtype(config.dtype)).removeprefix("torch.")),
        ("prompts", f"{len(data.prompts)} ({_left_out(data, '')})"),
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
        *([("rewards", describe_functions(checked.functions))] if checked.functions else []),
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


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What a config names, loaded as far as needed to know that it fits together."""

    names: dict[str, str]
    tokenizer: PreTrainedTokenizerFast
    data: PromptData
    columns: tuple[str, ...]
    functions: list[WeightedFunction]
    max_steps: int


def _check(config: PPORunConfig) -> _Checked:
    """Everything that can be found wrong before weights are read; a dry run and a run both begin with it."""
    check_inputs_stay(config, Path(config.output_dir))
    names = role_models(config)
    functions = load_functions(config.reward.functions)
    _check_models(config, names)
    tokenizer = open_tokenizer(names["actor"])
    data = _load_data(config, tokenizer)
    columns = _columns(config, data)
    check_columns(functions, columns)
    _check_lengths(config, names, data)
    return _Checked(
        names=names,
        tokenizer=tokenizer,
        data=data,
        columns=columns,
        functions=functions,
        max_steps=steps_of(config, len(data.prompts)),
    )


def _check_models(config: PPORunConfig, names: dict[str, str]) -> None:
    if "reward" in names:
        check_reward_model(names["reward"])
    check_same_tokenizer(names)
    if config.reference.sync_ref_model:
        check_same_shape(names["actor"], names["reference"], "reference.sync_ref_model mixes them")
    check_frozen_layers("actor", names["actor"], config.actor)
    check_frozen_layers("critic", names["critic"], config.critic)


def _check_lengths(config: PPORunConfig, names: dict[str, str], data: PromptData) -> None:
    """Raise `DataError` for the first prompt that with a full completion is longer than some model's positions."""
    role, limit = shortest_limit(names)
    new = config.generation.max_completion_length
    for prompt in data.prompts:
        num_tokens = len(prompt.tokens)
        if num_tokens + new > limit:
            raise DataError(
                f"{prompt.where}: the prompt's {num_tokens} tokens and generation.max_completion_length = {new} "
                f"make {num_tokens + new}, but the {role} model {names[role]} takes {limit}: lower one of "
                "data.max_prompt_length and generation.max_completion_length."
            )


def build_ppo_job(config: PPORunConfig) -> Job:
    """Roles, prompts, rewards and graph."""
    checked = _check(config)
    data, tokenizer = checked.data, checked.tokenizer
    texts = _Texts(tokenizer)
    sampling = sampling_task(config, stop_token_ids(checked.names["actor"], tokenizer))
    functions = _reward_functions(checked, texts)
    algorithm = PPO(config, sampling)
    roles = _roles(config, checked.names, checked.max_steps, texts)
    source = _PromptSource(config, data.prompts, checked.columns)
    fixed = _fixed_samples(config, checked, roles["actor"], texts, sampling)
    untrained = fixed.rows(0)
    return Job(
        title=f"PPO on {len(data.prompts)} prompts",
        graph=algorithm.graph(functions, _reward_keys(checked.columns)),
        roles=roles,
        max_steps=checked.max_steps,
        next_batch=source.next_batch,
        save=lambda folder: _save(roles, tokenizer, folder),
        samples=lambda step, batch: [
            *(untrained if step == 0 else ()),
            *texts.samples(step, batch, config.num_logged_samples),
            *fixed.rows(step + 1),
        ],
        num_tokens=lambda batch: int(batch["tokens"].lengths.sum()),
        memories={"ppo": algorithm},
        messages=(_left_out(data, "prompts "),) if data.overlong else (),
    )


def _fixed_samples(
    config: PPORunConfig, checked: _Checked, actor: LocalRole, texts: _Texts, sampling: SamplingTask
) -> FixedSamples:
    """The first prompts of the data, completed through the run for the report."""
    return FixedSamples(
        role=actor,
        task=sampling,
        prompts=[prompt.tokens for prompt in checked.data.prompts[: config.num_report_prompts]],
        decode=texts.decode,
        steps=sampled_steps(checked.max_steps, config.report_samples_every),
    )


def _left_out(data: PromptData, what: str) -> str:
    first = f", the first at {data.overlong[0]}" if data.overlong else ""
    return f"{data.num_overlong} {what}over data.max_prompt_length left out{first}"


@dataclass(frozen=True)
class _Texts:
    """Token ids back to texts, for rewards, stop strings and the log of samples."""

    tokenizer: PreTrainedTokenizerFast

    def decode(self, tokens: list[int]) -> str:
        """The text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def decode_all(self, tokens: list[int]) -> str:
        """The text with special tokens: a stop string may be one, as "<|im_end|>" is."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

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
        picked = [self.prompts[i] for i in self.loader.batch(step) for _ in range(self.num_generations)]
        first = step * len(picked)
        fields = {
            "prompts": Ragged.from_rows([p.tokens for p in picked], torch.int64),
            "index": Ragged.scalars(list(range(first, first + len(picked))), torch.int64),
        }
        columns = {column_key(name): [_value(p, name) for p in picked] for name in self.columns}
        return Batch(fields, columns | ({WHERE: [p.where for p in picked]} if columns else {}))


def _value(prompt: Prompt, column: str) -> Any:
    """What the data has in a column; of `prompt`, the text or the messages as they came."""
    if column == "prompt":
        return prompt.text if prompt.messages is None else prompt.messages
    return prompt.columns.get(column)


def _columns(config: PPORunConfig, data: PromptData) -> tuple[str, ...]:
    """The data's columns that reward functions are given. Raises `DataError` for a name that is taken."""
    if not config.reward.functions:
        return ()
    names = {key for prompt in data.prompts for key in prompt.columns}
    for name in RESERVED_ARGUMENTS:
        if name in names:
            raise DataError(
                f"{config.data.dataset_name}: the column {name!r} is reserved, since every reward function is "
                "given an argument of that name: rename the column."
            )
    return ("prompt", *sorted(names))


def _load_data(config: PPORunConfig, tokenizer: PreTrainedTokenizerFast) -> PromptData:
    data = config.data
    return load_prompts(
        data.dataset_name,
        tokenizer,
        max_prompt_length=data.max_prompt_length,
        apply_chat_template=data.apply_chat_template,
    )


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


def _reward_functions(checked: _Checked, texts: _Texts) -> Callable[[Batch], Outcome] | None:
    if not checked.functions:
        return None
    return RewardFunctions(
        functions=checked.functions,
        decode=texts.decode,
        decode_all=texts.decode_all,
        columns=checked.columns,
        max_steps=checked.max_steps,
    )


def _reward_keys(columns: tuple[str, ...]) -> tuple[str, ...]:
    """What reward functions read of a step's batch, besides tokens: nothing where there are none."""
    return (*(column_key(name) for name in columns), "index", WHERE) if columns else ()


def _roles(config: PPORunConfig, names: dict[str, str], max_steps: int, texts: _Texts) -> dict[str, LocalRole]:
    dtype = compute_dtype(config.dtype)
    frozen = TrainableConfig(
        max_tokens_per_micro_batch=config.actor.max_tokens_per_micro_batch, logits_chunk=config.actor.logits_chunk
    )
    trained = partial(LocalRole, trainable=True, max_steps=max_steps)
    actor = trained("actor", open_model(names["actor"], "lm", dtype), config.actor, seed=config.seed)
    value_model = open_model(names["critic"], "value", dtype)
    if config.critic.new_value_head:
        value_model.head.load_state_dict({"weight": torch.zeros(1, value_model.config.hidden_size)})
    critic = trained("critic", value_model, config.critic, seed=config.seed + 1)
    roles = {
        "actor": actor.can_generate(config.generation.num_slots, texts.decode_all),
        "critic": critic,
        "reference": LocalRole("reference", open_model(names["reference"], "lm", dtype), frozen),
    }
    if "reward" in names:
        roles["reward"] = LocalRole("reward", open_model(names["reward"], "reward", dtype), frozen)
    return roles


def _save(roles: dict[str, LocalRole], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    save_model(roles["actor"].model, folder, tokenizer=tokenizer)
    save_model(roles["critic"].model, folder.with_name("final_critic"), tokenizer=tokenizer)
