"""The step of a run's config, as the planner sees it: roles, calls, texts, and who waits for whom.

A test holds it equal to the graphs of `algorithms/`, which a planner must not import. It knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

from meshift.config.plan import Kind
from meshift.config.policy_runs import CriticFreeRunConfig, OnlineDPORunConfig
from meshift.config.runs import (
    DPORunConfig,
    KTORunConfig,
    PPORunConfig,
    ReferenceFreeRunConfig,
    RewardRunConfig,
    RolloutRunConfig,
    RunConfig,
    SFTRunConfig,
)
from meshift.config.sections import ReferenceConfig, TrainableConfig
from meshift.errors import ConfigError
from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.hf.adapter_targets import adapter_for
from meshift.planner.rollout_steps import USUAL_SHARE, Lengths, rollout_calls
from meshift.planner.workload import ComputeType, Mixing, PlannedCall, Role, Step, Texts

HEADS: Mapping[str, HeadKind] = {"critic": "value", "reward": "reward", "cost": "reward", "cost_critic": "value"}


def role_names(config: RunConfig) -> dict[str, str]:
    """The model that each role starts from, as the runs have it. Raises `ConfigError` for a run without a step."""
    if isinstance(config, SFTRunConfig | RewardRunConfig):
        return {"actor" if isinstance(config, SFTRunConfig) else "reward": str(config.model.model_name_or_path)}
    if isinstance(config, ReferenceFreeRunConfig):
        return {"actor": str(config.actor.model_name_or_path)}
    if isinstance(config, DPORunConfig | KTORunConfig):
        actor = str(config.actor.model_name_or_path)
        return {"actor": actor, "reference": config.reference.model_name_or_path or actor}
    if isinstance(config, PPORunConfig | CriticFreeRunConfig):
        return _rollout_names(config)
    raise ConfigError(f"a {type(config).__name__} has no step to plan")


def _rollout_names(config: PPORunConfig | CriticFreeRunConfig) -> dict[str, str]:
    actor, reward = str(config.actor.model_name_or_path), config.reward.model_name_or_path
    names, reference = {"actor": actor}, config.reference.model_name_or_path or actor
    scores = {"reward": reward} if reward is not None else {}
    if isinstance(config, CriticFreeRunConfig):
        return names | ({"reference": reference} if config.has_reference else {}) | scores
    if not config.ppo.shared_trunk:
        names["critic"] = config.critic.model_name_or_path or reward or actor
    names |= {"reference": reference, **scores}
    if not config.cost.is_given:
        return names
    cost = config.cost.model_name_or_path
    names["cost_critic"] = config.cost_critic.model_name_or_path or cost or reward or actor
    return names | ({"cost": cost} if cost is not None else {})


def step_of(
    config: RunConfig, models: Mapping[str, DecoderConfig], dtype: ComputeType, lengths: Lengths | None = None
) -> Step:
    """The step. `models` has every role of `role_names`. Raises `ConfigError` for one that cannot be counted."""
    lengths = lengths or Lengths()
    if isinstance(config, RolloutRunConfig):
        trained = {"actor": config.actor}
        if isinstance(config, PPORunConfig):
            trained |= {"critic": config.critic, "cost_critic": config.cost_critic}
        calls = rollout_calls(config, models, lengths)
        step = _with_rounds(config, _step(models, trained, dtype, calls, config.reference))
        return replace(step, draws_ahead=config.max_staleness > 0)
    if isinstance(config, DPORunConfig):
        return _step(models, {"actor": config.actor}, dtype, _pair_calls(config, lengths), config.reference)
    if isinstance(config, KTORunConfig):
        return _step(models, {"actor": config.actor}, dtype, _judged_calls(config, lengths), config.reference)
    if isinstance(config, ReferenceFreeRunConfig):
        texts = _given_texts(config.data.batch_size, config.data.max_length, 2, lengths)
        calls = (_given_call("train_actor", "actor", texts, training=True),)
        return _step(models, {"actor": config.actor}, dtype, calls, ReferenceConfig())
    if not isinstance(config, SFTRunConfig | RewardRunConfig):
        raise ConfigError(f"a {type(config).__name__} has no step to plan")
    role, per_prompt = ("actor", 1) if isinstance(config, SFTRunConfig) else ("reward", 2)
    texts = _given_texts(config.data.batch_size, config.data.max_length, per_prompt, lengths)
    call = _given_call(f"train_{role}", role, texts, training=True)
    if role == "reward":
        call = replace(call, num_read=1.0)
    return _step(models, {role: config.model}, dtype, (call,), ReferenceConfig())


def in_one_process(config: RunConfig, step: Step) -> Step:
    """Of a run without a plan, where roles that begin as one with adapters read what those leave as it is.

    As `runtime.models.kept_models` says: a reference that does not move, and a reward model beside its critic.
    """
    names, moving = role_names(config), {mixing.target for mixing in step.mixings}
    kept = {role for role, one in step.roles.items() if one.trained or one.offloaded or role in moving}
    beside = {
        (names[role], one.head == "lm")
        for role, one in step.roles.items()
        if one.config.adapter is not None and not one.offloaded
    }
    roles = {
        role: replace(one, borrows=role not in kept and (names[role], one.head == "lm") in beside)
        for role, one in step.roles.items()
    }
    return replace(step, roles=roles)


def _with_rounds(config: RolloutRunConfig, step: Step) -> Step:
    """Online DPO's reference becomes the actor after every round, which is a mixing too."""
    if not isinstance(config, OnlineDPORunConfig) or config.online_dpo.steps_per_round is None:
        return step
    return replace(
        step, mixings=(Mixing(source="actor", target="reference", every=config.online_dpo.steps_per_round),)
    )


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
            config=_adapted(model, trained.get(name, still)),
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


def _adapted(model: DecoderConfig, how: TrainableConfig) -> DecoderConfig:
    if how.lora is None:
        return model
    return replace(model, adapter=adapter_for(model, how.lora, how.num_frozen_layers))


def _pair_calls(config: DPORunConfig, lengths: Lengths) -> tuple[PlannedCall, ...]:
    texts = _given_texts(config.data.batch_size, config.data.max_length, 2, lengths)
    training = _given_call("train_actor", "actor", texts, training=True)
    if config.dpo.precompute_ref_log_probs:
        return (training,)
    reading = _given_call("reference", "reference", texts)
    return reading, replace(training, waits=frozenset((reading.name,)))


def _judged_calls(config: KTORunConfig, lengths: Lengths) -> tuple[PlannedCall, ...]:
    """KTO's: the reference reads completions with their own prompts and with others', the actor with others'."""
    texts = _given_texts(config.data.batch_size, config.data.max_length, 1, lengths)
    readings = [
        _given_call("reference", "reference", texts),
        _given_call("reference_mismatched", "reference", texts),
        _given_call("mismatched", "actor", texts),
    ]
    training = _given_call("train_actor", "actor", texts, training=True)
    return (*readings, replace(training, waits=frozenset(call.name for call in readings)))


def _given_call(name: str, role: str, texts: Texts, *, training: bool = False) -> PlannedCall:
    kind: Kind = "train" if training else "infer"
    return PlannedCall(name=name, role=role, kind=kind, texts=texts, num_read=texts.completion)


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
