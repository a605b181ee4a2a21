"""The step of a run's config, as the planner sees it: roles, calls, texts, and who waits for whom.

A test holds it equal to the graphs of `algorithms/`, which a planner must not import. It knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
USUAL_SIGNAL = 0.5
"""Of prompts, those whose completions differ in score, where nothing is said: DAPO draws others for the rest."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens of prompts and completions; None: half of what the config allows.

    `signal` is the share of prompts whose completions differ in score; None: a half (only DAPO asks).
    """

    prompt: int | None = None
    completion: float | None = None
    signal: float | None = None


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
    """The step. `models` has every role of `role_names`."""
    lengths = lengths or Lengths()
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
    texts = _drawn_texts(config, lengths)
    drawing = _drawing(config, models, texts)
    drawn = frozenset(call.name for call in drawing)

    def call(name: str, role: str, kind: Kind, waits: frozenset[str] = drawn) -> PlannedCall:
        read = PlannedCall(name=name, role=role, kind=kind, texts=texts, waits=waits, num_read=texts.completion)
        if kind != "train":
            return read
        return replace(read, num_passes=config.num_passes, num_updates=config.num_mini_batches)

    calls = list(drawing)
    if isinstance(config, DAPORunConfig) and config.dapo.dynamic_sampling:
        calls += _further_rounds(config, drawing, USUAL_SIGNAL if lengths.signal is None else lengths.signal)
        drawn = frozenset(call.name for call in calls)
    if isinstance(config, ReMaxRunConfig):
        calls += _greedy(drawing)
    if "reference" in models:
        calls.append(call("reference", "reference", "infer", _after(drawing, drawn)))
    if "critic" in models:
        calls.append(call("values", "critic", "infer", _after(drawing, drawn)))
    if isinstance(config, PolicyRunConfig) and _reads_old_logprobs(config):
        calls.append(call("old_logprobs", "actor", "infer", _after(drawing, drawn)))
    known = frozenset(one.name for one in calls)
    calls.append(call("train_actor", "actor", "train", known))
    if "critic" in models:
        calls.append(call("train_critic", "critic", "train", known))
    return tuple(calls)


def _drawn_texts(config: RolloutRunConfig, lengths: Lengths) -> Texts:
    longest, most = config.data.max_prompt_length, config.generation.max_completion_length
    return Texts(
        num_prompts=config.data.batch_size,
        per_prompt=config.generation.num_generations,
        prompt=lengths.prompt or max(1, round(USUAL_SHARE * longest)),
        longest_prompt=max(longest, lengths.prompt or 0),
        completion=min(lengths.completion or max(1.0, USUAL_SHARE * most), most),
        longest_completion=most,
    )


def _drawing(
    config: RolloutRunConfig, models: Mapping[str, DecoderConfig], texts: Texts
) -> tuple[PlannedCall, ...]:
    """The rollout and, where there is a reward model, its scores."""
    slots = config.generation.num_slots
    rollout = PlannedCall(name="rollout", role="actor", kind="generate", texts=texts, num_slots=slots)
    if "reward" not in models:
        return (rollout,)
    waits = frozenset((rollout.name,))
    return rollout, PlannedCall(name="score", role="reward", kind="infer", texts=texts, waits=waits)


def _after(drawing: Sequence[PlannedCall], drawn: frozenset[str]) -> frozenset[str]:
    """What a reading of completions waits for: the rollout, or all rounds of drawing where they are several."""
    return drawn if len(drawn) > len(drawing) else frozenset((drawing[0].name,))


def _further_rounds(config: DAPORunConfig, drawing: Sequence[PlannedCall], signal: float) -> list[PlannedCall]:
    """DAPO's rounds after the first, each after all calls of the one before."""
    counts = prompts_by_round(config.data.batch_size, signal, config.dapo.max_sampling_rounds)
    calls: list[PlannedCall] = []
    before = frozenset(call.name for call in drawing)
    for number, count in enumerate(counts[1:], start=2):
        again = _again(drawing, f"round {number}", before)
        fewer = [replace(call, texts=replace(call.texts, num_prompts=count)) for call in again]
        calls, before = [*calls, *fewer], frozenset(call.name for call in fewer)
    return calls


def prompts_by_round(num_prompts: int, signal: float, most: int) -> list[int]:
    """Prompts drawn in each round of DAPO's dynamic sampling, if that share of each round's has signal."""
    counts, missing = [num_prompts], num_prompts * (1 - signal)
    while missing >= 0.5 and len(counts) < most:  # less than half a prompt is missing in fewer than half of steps
        counts.append(num_prompts if signal == 0 else min(num_prompts, ceil(missing / signal)))
        missing -= signal * counts[-1]
    return counts


def _greedy(drawing: Sequence[PlannedCall]) -> list[PlannedCall]:
    """ReMax's completion of each prompt once more, by the most probable tokens."""
    again = _again(drawing, "greedy", frozenset())
    return [replace(call, texts=replace(call.texts, per_prompt=1), metric="greedy_baseline") for call in again]


def _again(drawing: Sequence[PlannedCall], said: str, waits: frozenset[str]) -> list[PlannedCall]:
    """The same calls under names of their own; the first waits for `waits`."""
    named = {call.name: f"{call.name} ({said})" for call in drawing}
    return [
        replace(
            call,
            name=named[call.name],
            metric=call.name,
            waits=frozenset(named[name] for name in call.waits) or waits,
        )
        for call in drawing
    ]


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
        longest_prompt=prompt,
        completion=completion,
        longest_completion=max(1, max_length - prompt),
    )
