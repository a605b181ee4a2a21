"""The calls of a step on sampled completions, as the planner sees them: drawing, readings, updates.

Loops (DAPO's rounds, ReMax's greedy completions, the choice of RAFT and online DPO) are written out as calls. It
knows nothing of devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from meshift.config.plan import Kind
from meshift.config.policy_runs import (
    DAPORunConfig,
    OnlineDPORunConfig,
    RAFTRunConfig,
    ReMaxRunConfig,
)
from meshift.config.runs import PPORunConfig, RolloutRunConfig
from meshift.models.config import DecoderConfig
from meshift.planner.workload import PlannedCall, Texts

USUAL_SHARE = 0.5
"""Of a length limit that texts have in the mean, where nothing is said."""
USUAL_SIGNAL = 0.5
"""Of prompts, those whose completions differ in score, where nothing is said: DAPO draws others for the rest."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Mean tokens of prompts and completions; None: half of what the config allows.

    `signal` is the share of prompts whose completions differ in score; None: a half (only DAPO asks).
    """

    prompt: float | None = None
    completion: float | None = None
    signal: float | None = None


def rollout_calls(
    config: RolloutRunConfig, models: Mapping[str, DecoderConfig], lengths: Lengths
) -> tuple[PlannedCall, ...]:
    """All model calls of a step, in program order."""
    texts = _drawn_texts(config, lengths)
    calls = list(_drawing(config, models, texts))
    first = drawing = frozenset((calls[0].name,))
    if isinstance(config, DAPORunConfig) and config.dapo.dynamic_sampling:
        calls += _further_rounds(config, calls, USUAL_SIGNAL if lengths.signal is None else lengths.signal)
        first = drawing = frozenset(call.name for call in calls)  # what is kept is known when all is drawn
    if isinstance(config, ReMaxRunConfig):
        greedy = _greedy(calls)
        calls, drawing = [*calls, *greedy], drawing | {call.name for call in greedy}
    kept = _kept_texts(config, texts)
    if isinstance(config, OnlineDPORunConfig):
        first = drawing = frozenset(call.name for call in calls)  # pairs are chosen when all is drawn and scored
    calls += _readings(config, models, kept if isinstance(config, OnlineDPORunConfig) else texts, first)
    known = frozenset(one.name for one in calls)
    if isinstance(config, RAFTRunConfig):
        drawing = known  # the best are chosen by scores and the reference's log-probs
    calls += [
        PlannedCall(
            name=f"train_{role}",
            role=role,
            kind="train",
            texts=kept,
            waits=known,
            num_read=kept.completion,
            num_passes=config.num_passes,
            num_updates=config.num_mini_batches,
        )
        for role in ("actor", "critic", "cost_critic")
        if role in models
    ]
    return _ahead(calls, drawing) if config.max_staleness > 0 else tuple(calls)


def _ahead(calls: Sequence[PlannedCall], drawing: frozenset[str]) -> tuple[PlannedCall, ...]:
    """Of a step that draws for a later one: drawing waits for none of its calls, nor they for it.

    A process draws after its other calls. (Where devices draw with what they train, they do so first, which takes
    them as long.)
    """
    others = [replace(call, waits=call.waits - drawing) for call in calls if call.name not in drawing]
    drawn = [replace(call, waits=call.waits & drawing) for call in calls if call.name in drawing]
    return (*others, *drawn)


def _readings(
    config: RolloutRunConfig, models: Mapping[str, DecoderConfig], texts: Texts, waits: frozenset[str]
) -> list[PlannedCall]:
    """Of what was drawn, by every role that is not trained by it alone, in the order of the graphs."""

    def call(name: str, role: str, kind: Kind = "infer", read: float | None = None) -> PlannedCall:
        num_read = texts.completion if read is None else read
        return PlannedCall(name=name, role=role, kind=kind, texts=texts, waits=waits, num_read=num_read)

    calls = []
    if "reference" in models:
        calls.append(call("reference", "reference"))
    if config.old_logprobs == "recomputed":
        calls.append(call("old_logprobs", "actor"))
    if isinstance(config, PPORunConfig):
        shared = config.ppo.shared_trunk  # then by a head for one number a row, which is next to nothing
        calls.append(call("values", "actor", read=0.0) if shared else call("values", "critic"))
    if "cost" in models:
        calls.append(call("cost", "cost", read=1.0))
    if "cost_critic" in models:
        calls.append(call("cost_values", "cost_critic"))
    return calls


def _kept_texts(config: RolloutRunConfig, texts: Texts) -> Texts:
    """What is trained on: all that a step draws, if not a choice of it."""
    units, _, each = config.trained_on
    if not isinstance(config, OnlineDPORunConfig | RAFTRunConfig):
        return texts
    return replace(texts, per_prompt=max(1, units * each // texts.num_prompts))


def _drawn_texts(config: RolloutRunConfig, lengths: Lengths) -> Texts:
    longest, most = config.data.max_prompt_length, config.generation.max_completion_length
    least = float(max(1, config.generation.min_new_tokens))
    return Texts(
        num_prompts=config.data.batch_size,
        per_prompt=config.generation.num_generations,
        prompt=lengths.prompt or max(1, round(USUAL_SHARE * longest)),
        longest_prompt=max(longest, ceil(lengths.prompt or 0)),
        completion=min(max(lengths.completion or USUAL_SHARE * most, least), most),
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
