"""The step of a run's config, as the planner sees it: roles, calls, texts, and who waits for whom.

A test holds it equal to the graphs of `algorithms/`, which a planner must not import. It knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from meshift.config.plan import Kind
from meshift.config.policy_runs import DAPORunConfig, PolicyRunConfig, ReMaxRunConfig
from meshift.config.runs import (
    DPORunConfig,
    PPORunConfig,
    RewardRunConfig,
    RolloutRunConfig,
    RunConfig,
    SFTRunConfig,
)
from meshift.config.sections import ReferenceConfig, TrainableConfig
from meshift.errors import ConfigError
from meshift.models.config import DecoderConfig, HeadKind
from meshift.planner.workload import ComputeType, Mixing, PlannedCall, Role, Step, Texts

HEADS: Mapping[str, HeadKind] = {"critic": "value", "reward": "reward"}
USUAL_SHARE = 0.5
"""Of a length limit that texts have in the mean, where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens of prompts and completions; None: half of what the config allows."""

    prompt: float | None = None
    completion: float | None = None


def role_names(config: RunConfig) -> dict[str, str]:
    """The model that each role starts from, as the runs have it. Raises `ConfigError` for a run without a step."""
    if isinstance(config, PPORunConfig):
        actor, reward = str(config.actor.model_name_or_path), config.reward.model_name_or_path
        names = {
            "actor": actor,
            "critic": config.critic.model_name_or_path or reward or actor,
            "reference": config.reference.model_name_or_path or actor,
        }
        return names | ({"reward": reward} if reward is not None else {})
    if isinstance(config, PolicyRunConfig):
        actor, reward = str(config.actor.model_name_or_path), config.reward.model_name_or_path
        names = {"actor": actor}
        if config.has_reference:
            names["reference"] = config.reference.model_name_or_path or actor
        return names | ({"reward": reward} if reward is not None else {})
    if isinstance(config, DPORunConfig):
        actor = str(config.actor.model_name_or_path)
        return {"actor": actor, "reference": config.reference.model_name_or_path or actor}
    if isinstance(config, SFTRunConfig):
        return {"actor": str(config.model.model_name_or_path)}
    if isinstance(config, RewardRunConfig):
        return {"reward": str(config.model.model_name_or_path)}
    raise ConfigError(f"a {type(config).__name__} has no step to plan")


def step_of(
    config: RunConfig, models: Mapping[str, DecoderConfig], dtype: ComputeType, lengths: Lengths | None = None
) -> Step:
    """The step. `models` has every role of `role_names`. `ConfigError` for a method that draws in rounds."""
    lengths = lengths or Lengths()
    if isinstance(config, DAPORunConfig | ReMaxRunConfig):
        raise ConfigError("DAPO and ReMax draw in rounds, which the planner cannot foresee; plan them as GRPO")
    if isinstance(config, RolloutRunConfig):
        calls = _rollout_calls(config, models, lengths)
        trained = {"actor": config.actor}
        if isinstance(config, PPORunConfig):
            trained["critic"] = config.critic
        return _step(models, trained, dtype, calls, config.reference)
    if isinstance(config, DPORunConfig):
        return _step(models, {"actor": config.actor}, dtype, _pair_calls(config, lengths), config.reference)
    assert isinstance(config, SFTRunConfig | RewardRunConfig)
    role, per_prompt = ("actor", 1) if isinstance(config, SFTRunConfig) else ("reward", 2)
    texts = _given_texts(config.data.batch_size, config.data.max_length, per_prompt, lengths)
    read = texts.completion if role == "actor" else 1.0
    call = PlannedCall(name="train", role=role, kind="train", texts=texts, num_read=read)
    return _step(models, {role: config.model}, dtype, (call,), ReferenceConfig())


def _step(
    models: Mapping[str, DecoderConfig],
    trained: Mapping[str, TrainableConfig],
    dtype: ComputeType,
    calls: Sequence[PlannedCall],
    reference: ReferenceConfig,
) -> Step:
    used = {call.role for call in calls}
    like = next(iter(trained.values()))
    still = TrainableConfig(
        max_tokens_per_micro_batch=like.max_tokens_per_micro_batch, logits_chunk=like.logits_chunk
    )
    roles = {
        name: Role(
            name=name,
            config=model,
            head=HEADS.get(name, "lm"),
            dtype=dtype,
            trained=name in trained,
            averaged=name == "reference" and reference.sync_ref_model,
            passes=trained.get(name, still),
        )
        for name, model in models.items()
        if name in used
    }
    mixings: tuple[Mixing, ...] = ()
    if reference.sync_ref_model and "reference" in roles:
        mixings = (Mixing(source="actor", target="reference", every=reference.ref_model_sync_steps),)
    return Step(roles=roles, calls=tuple(calls), mixings=mixings)


def _rollout_calls(
    config: RolloutRunConfig, models: Mapping[str, DecoderConfig], lengths: Lengths
) -> tuple[PlannedCall, ...]:
    """Drawing, readings of what was drawn, and updates."""
    longest, most = config.data.max_prompt_length, config.generation.max_completion_length
    texts = Texts(
        num_prompts=config.data.batch_size,
        per_prompt=config.generation.num_generations,
        prompt=lengths.prompt or max(1, round(USUAL_SHARE * longest)),
        longest_prompt=max(longest, ceil(lengths.prompt or 0)),
        completion=min(lengths.completion or max(1.0, USUAL_SHARE * most), most),
        longest_completion=most,
    )
    drawn = frozenset(("rollout",))

    def call(
        name: str, role: str, kind: Kind, waits: frozenset[str], num_read: float | None = None
    ) -> PlannedCall:
        training = kind == "train"
        return PlannedCall(
            name=name,
            role=role,
            kind=kind,
            texts=texts,
            waits=waits,
            num_read=texts.completion if num_read is None else num_read,
            num_passes=config.num_passes if training else 1,
            num_updates=config.num_mini_batches if training else 1,
            num_slots=config.generation.num_slots,
        )

    calls = [call("rollout", "actor", "generate", frozenset())]
    if "reward" in models:
        calls.append(call("score", "reward", "infer", drawn, 1.0))
    if "reference" in models:
        calls.append(call("reference", "reference", "infer", drawn))
    if "critic" in models:
        calls.append(call("values", "critic", "infer", drawn))
    if isinstance(config, PolicyRunConfig) and _reads_old_logprobs(config):
        calls.append(call("old_logprobs", "actor", "infer", drawn))
    known = frozenset(one.name for one in calls)
    calls.append(call("train_actor", "actor", "train", known))
    if "critic" in models:
        calls.append(call("train_critic", "critic", "train", known))
    return tuple(calls)


def _reads_old_logprobs(config: PolicyRunConfig) -> bool:
    return config.policy.recompute_logprobs and config.num_passes * config.num_mini_batches > 1


def _pair_calls(config: DPORunConfig, lengths: Lengths) -> tuple[PlannedCall, ...]:
    texts = _given_texts(config.data.batch_size, config.data.max_length, 2, lengths)
    read = texts.completion
    training = PlannedCall(name="train_actor", role="actor", kind="train", texts=texts, num_read=read)
    if config.dpo.precompute_ref_log_probs:
        return (training,)
    reading = PlannedCall(name="reference", role="reference", kind="infer", texts=texts, num_read=read)
    return reading, PlannedCall(**{**vars(training), "waits": frozenset(("reference",))})


def _given_texts(batch_size: int, max_length: int, per_prompt: int, lengths: Lengths) -> Texts:
    """Texts of at most `max_length` tokens in all; half of one is prompt where nothing is said."""
    mean = max(2.0, USUAL_SHARE * max_length)
    prompt = lengths.prompt or max(1, round(mean / 2))
    completion = lengths.completion or mean / 2
    return Texts(
        num_prompts=batch_size,
        per_prompt=per_prompt,
        prompt=prompt,
        longest_prompt=ceil(prompt),
        completion=completion,
        longest_completion=max(1, max_length - ceil(prompt)),
    )
