"""What runs on sampled completions share: inputs checked, roles opened, and a job built around a method's graph.

It knows no method; `ppo_run.py` and `policy_run.py` bring theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshift.algorithms.rollouts import total_score
from meshift.batch import WHERE, Batch, Outcome, column_key
from meshift.config.runs import RolloutRunConfig
from meshift.config.sections import TrainableConfig
from meshift.data.prompts import PromptData
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.graph.calls import Graph
from meshift.rewards.configured import check_columns, describe_functions, load_functions
from meshift.rewards.functions import RewardFunctions, WeightedFunction
from meshift.runtime.ahead import Queue, stale_notes
from meshift.runtime.fixed_samples import FixedSamples, reward_judge, sampled_steps
from meshift.runtime.models import (
    HEADS,
    check_reward_model,
    check_same_shape,
    check_same_tokenizer,
    check_trained,
    compute_dtype,
    kept_models,
    model_rows,
    open_tokenizer,
    resident_bytes,
    stop_token_ids,
    trained_rows,
)
from meshift.runtime.role_spec import RoleSpec, frozen_like
from meshift.runtime.rollout_prompts import PromptSource, check_lengths, left_out, load_data, reward_columns
from meshift.runtime.run import Job, steps_of
from meshift.runtime.run_folder import check_inputs_stay
from meshift.training.checkpoint import Remembers
from meshift.training.text_readings import SIDES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEXTS = ("tokens", *SIDES)
"""The keys of what is trained on: completions, or pairs of them."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What a config names, loaded as far as needed to know that it fits together.

    `names` are the models of the roles, `trained` how those that learn are trained.
    """

    names: dict[str, str]
    trained: Mapping[str, TrainableConfig]
    tokenizer: PreTrainedTokenizerFast
    data: PromptData
    columns: tuple[str, ...]
    functions: list[WeightedFunction]
    costs: list[WeightedFunction]
    max_steps: int

    @cached_property
    def texts(self) -> Texts:
        """Token ids to texts."""
        return Texts(self.tokenizer)

    @property
    def reward_keys(self) -> tuple[str, ...]:
        """What reward functions read of a step's batch besides tokens, and errors of where a sample comes from."""
        return (*(column_key(name) for name in self.columns), "index", WHERE)

    def reward_functions(self) -> Callable[[Batch], Outcome] | None:
        """The host call that scores texts, if any function does."""
        return self._calling(self.functions)

    def cost_functions(self) -> Callable[[Batch], Outcome] | None:
        """The same of what they cost."""
        return self._calling(self.costs)

    def _calling(self, functions: list[WeightedFunction]) -> Callable[[Batch], Outcome] | None:
        if not functions:
            return None
        return RewardFunctions(
            functions=functions,
            decode=self.texts.decode,
            decode_all=self.texts.decode_all,
            columns=self.columns,
            max_steps=self.max_steps,
        )


def check_inputs(
    config: RolloutRunConfig, names: dict[str, str], trained: Mapping[str, TrainableConfig]
) -> Checked:
    """Everything that can be found wrong before weights are read; a dry run and a run both begin with it."""
    check_inputs_stay(config, Path(config.output_dir))
    functions, costs = load_functions(config.reward.functions), load_functions(config.cost_functions)
    _check_models(config, names, trained)
    tokenizer = open_tokenizer(names["actor"])
    data = load_data(config, tokenizer)
    columns = reward_columns(config, data)
    check_columns([*functions, *costs], columns)
    check_lengths(config, names, data)
    return Checked(
        names=names,
        trained=trained,
        tokenizer=tokenizer,
        data=data,
        columns=columns,
        functions=functions,
        costs=costs,
        max_steps=steps_of(config, len(data.prompts)),
    )


def _check_models(
    config: RolloutRunConfig, names: Mapping[str, str], trained: Mapping[str, TrainableConfig]
) -> None:
    for role in names.keys() & {"reward", "cost"}:
        check_reward_model(names[role], role)
    check_same_tokenizer(names)
    if config.reference.sync_ref_model:
        check_same_shape(names["actor"], names["reference"], "reference.sync_ref_model mixes them")
    for role, how in trained.items():
        check_trained(role, names[role], how)


def describe(config: RolloutRunConfig, checked: Checked) -> list[tuple[str, str]]:
    """The rows of a dry run: models, batch arithmetic, steps, rewards, memory."""
    data, max_steps = checked.data, checked.max_steps
    sequences, updates, (count, what, texts) = config.num_sequences, config.num_mini_batches, config.trained_on
    chosen = "" if count == sequences and texts == 1 else f"-> at most {count} {what} "
    longest = max(len(p.tokens) for p in data.prompts) + config.generation.max_completion_length
    budget = config.actor.max_tokens_per_micro_batch
    return [
        *model_rows(checked.names, _kept(config, checked)),
        ("compute type", str(compute_dtype(config.dtype)).removeprefix("torch.")),
        ("prompts", f"{len(data.prompts)} ({left_out(data, '')})"),
        (
            "batch",
            f"{config.data.batch_size} prompts x {config.generation.num_generations} generations = {sequences} "
            f"sequences {chosen}-> {config.num_passes} x {updates} updates of {count / updates:g} {what}",
        ),
        (
            "micro-batches",
            f"at most {budget} tokens on each data rank; up to {count * texts * longest // updates} tokens "
            "an update",
        ),
        (
            "steps",
            f"{max_steps}, {max_steps * config.data.batch_size / len(data.prompts):.2f} passes over the prompts",
        ),
        *_asynchronous(config),
        *([("rewards", describe_functions(checked.functions))] if checked.functions else []),
        *([("costs", describe_functions(checked.costs))] if checked.costs else []),
        *trained_rows(checked.names, checked.trained),
        ("memory", f"{_resident_bytes(config, checked) / 1e9:.2f} GB for weights, gradients and optimizers"),
        ("output", config.output_dir),
    ]


def _asynchronous(config: RolloutRunConfig) -> list[tuple[str, str]]:
    if config.max_staleness == 0:
        return []
    steps = "step" if config.max_staleness == 1 else "steps"
    text = f"completions are drawn {config.max_staleness} {steps} ahead, by the weights of then"
    return [("asynchronous", "; ".join((text, *stale_notes(config))))]


def _resident_bytes(config: RolloutRunConfig, checked: Checked) -> int:
    dtype = compute_dtype(config.dtype)
    return sum(
        resident_bytes(model, HEADS.get(role, "lm"), dtype, checked.trained.get(role))
        for role, model in _kept(config, checked).items()
    )


def _kept(config: RolloutRunConfig, checked: Checked) -> dict[str, str]:
    return kept_models(checked.names, checked.trained, config.plan, moves=config.reference_moves)


def rollout_job(
    config: RolloutRunConfig,
    checked: Checked,
    source: PromptSource,
    *,
    title: str,
    graph: Graph,
    roles: Mapping[str, Any],
    save: Callable[[Path], None],
    memories: Mapping[str, Remembers],
) -> Job:
    """A method's graph with prompts, samples for the log and the report, and what is saved."""
    data, texts = checked.data, checked.texts
    fixed = _fixed_samples(config, checked, roles, run_sampling(config, checked))
    untrained = fixed.rows(0)
    return Job(
        title=f"{title} on {len(data.prompts)} prompts",
        graph=graph,
        roles=roles,
        max_steps=checked.max_steps,
        next_batch=source.next_batch,
        save=save,
        samples=lambda step, batch: [
            *(untrained if step == 0 else ()),
            *texts.samples(step, batch, config.num_logged_samples),
        ],
        fixed=fixed.rows,
        num_tokens=lambda batch: sum(int(batch[key].lengths.sum()) for key in TEXTS if key in batch),
        memories=memories,
        rows=data.prompts,
        messages=(*((left_out(data, "prompts "),) if data.overlong else ()), *stale_notes(config)),
        queue=Queue(config.max_staleness, checked.max_steps) if config.max_staleness > 0 else None,
    )


def _fixed_samples(
    config: RolloutRunConfig, checked: Checked, roles: Mapping[str, Any], sampling: SamplingTask
) -> FixedSamples:
    """The first prompts of the data, completed through the run for the report."""
    return FixedSamples(
        role=roles["actor"],
        task=sampling,
        prompts=[prompt.tokens for prompt in checked.data.prompts[: config.num_report_prompts]],
        decode=checked.texts.decode,
        steps=sampled_steps(checked.max_steps, config.report_samples_every),
        judge=reward_judge(config.reward, roles.get("reward")),
    )


@dataclass(frozen=True)
class Texts:
    """Token ids back to texts, for rewards, stop strings and the log of samples."""

    tokenizer: PreTrainedTokenizerFast

    def decode(self, tokens: list[int]) -> str:
        """The text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def decode_all(self, tokens: list[int]) -> str:
        """The text with special tokens: a stop string may be one, as "<|im_end|>" is."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=False))

    def samples(self, step: int, batch: Batch, count: int) -> list[dict[str, Any]]:
        """The first completions of a step, as rows of samples.jsonl; `reward` is None where nothing scored one.

        Of pairs both texts, one after the other, with the `side` of each.
        """
        if "chosen" in batch:
            return self._of_pairs(step, batch, count)
        rows, judged = [], total_score(batch, 1.0)[1]
        for i, tokens in enumerate(batch["tokens"].rows()[:count]):
            length = int(batch["completion_lengths"].values[i])
            rows.append(
                {
                    "step": step + 1,
                    "index": int(batch["index"].values[i]),
                    "prompt": self.decode(tokens[: len(tokens) - length].tolist()),
                    "completion": self.decode(tokens[len(tokens) - length :].tolist()),
                    "reward": float(batch["scores"].values[i]) if judged[i] else None,
                    "truncated": bool(batch["truncated"].values[i]),
                }
            )
        return rows

    def _of_pairs(self, step: int, batch: Batch, count: int) -> list[dict[str, Any]]:
        rows = []
        for i in range(min(len(batch), (count + 1) // 2)):
            num_prompt = int(batch["num_prompt_tokens"].values[i])
            for side in SIDES:
                tokens = batch[side].rows()[i].tolist()
                rows.append(
                    {
                        "step": step + 1,
                        "index": int(batch[f"{side}_index"].values[i]),
                        "prompt": self.decode(tokens[:num_prompt]),
                        "completion": self.decode(tokens[num_prompt:]),
                        "reward": float(batch[f"{side}_scores"].values[i]),
                        "truncated": bool(batch[f"{side}_truncated"].values[i]),
                        "side": side,
                    }
                )
        return rows[:count]


def sampling_task(config: RolloutRunConfig, stops: tuple[int, ...]) -> SamplingTask:
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


def run_sampling(config: RolloutRunConfig, checked: Checked) -> SamplingTask:
    """How completions are drawn, with the stop tokens of the actor's model."""
    return sampling_task(config, stop_token_ids(checked.names["actor"], checked.tokenizer))


def sketched_sampling(config: RolloutRunConfig) -> tuple[SamplingTask, Callable[[Batch], Outcome] | None]:
    """What a graph is made of besides the config, before anything is read: enough to see its calls."""
    return sampling_task(config, ()), (lambda batch: Outcome()) if config.reward.functions else None


def rollout_specs(config: RolloutRunConfig, checked: Checked) -> dict[str, RoleSpec]:
    """The roles of a method on sampled completions, by name."""
    return {name: _spec(name, config, checked) for name in checked.names}


def _spec(name: str, config: RolloutRunConfig, checked: Checked) -> RoleSpec:
    trained = checked.trained.get(name)
    spec = RoleSpec(
        name=name,
        model=checked.names[name],
        head=HEADS.get(name, "lm"),
        dtype=compute_dtype(config.dtype),
        config=trained or frozen_like(config.actor),
        max_steps=checked.max_steps if trained is not None else None,
        seed=config.seed,
    )
    if name != "actor":
        return replace(spec, moves=name == "reference" and config.reference_moves)
    return replace(spec, num_slots=config.generation.num_slots, decode=checked.texts.decode_all)
