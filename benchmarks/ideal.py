"""From what one of our rounds did to the seconds that the limits allow for it, work by work (`limits.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.limits import Limits, Shape, forward_seconds, generation_seconds, training_seconds
from benchmarks.sizes import NUM_GENERATIONS, PPO_EPOCHS
from benchmarks.works import Work

Lengths = Sequence[int]


def ideal_seconds(work: Work, shape: Shape, limits: Limits, prompts: Lengths, did: Mapping[str, Any]) -> float:
    """Seconds for a round that said what it `did`: its `lengths`, of completions, texts or sequences."""
    lengths = did["lengths"]
    match work.method:
        case "generation":
            return generation_seconds(shape, limits, prompts, lengths)
        case "inference":
            return forward_seconds(shape, limits, lengths, sum(lengths) - len(lengths))
        case "sft":
            tokens = lengths["tokens"]
            return training_seconds(shape, limits, tokens, sum(tokens) - len(tokens))
        case "reward":
            whole = [*lengths["chosen"], *lengths["rejected"]]
            return training_seconds(shape, limits, whole, 0, _pair_prompts(did))
        case "dpo":
            return _dpo(shape, limits, did)
    return _rl(work.method, shape, limits, lengths)


def _dpo(shape: Shape, limits: Limits, did: Mapping[str, Any]) -> float:
    """The reference reads and the actor learns both texts of every pair; the head sees their answers."""
    lengths = [*did["lengths"]["chosen"], *did["lengths"]["rejected"]]
    num_read = sum(lengths) - 2 * sum(did["num_prompt_tokens"])
    read = forward_seconds(shape, limits, lengths, num_read, _pair_prompts(did))
    return read + training_seconds(shape, limits, lengths, num_read, _pair_prompts(did))


def _pair_prompts(did: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The prompt of a pair need not run for its second text."""
    return [(length, 1) for length in did["num_prompt_tokens"]]


def _rl(method: str, shape: Shape, limits: Limits, lengths: Mapping[str, Lengths]) -> float:
    """Generation, the forward passes of the frozen roles, and every update."""
    whole, new = lengths["tokens"], lengths["completion_lengths"]
    prompts = [a - b for a, b in zip(whole, new, strict=True)]
    seconds = generation_seconds(shape, limits, prompts, new)
    if method != "ppo":
        again = [(length, NUM_GENERATIONS - 1) for length in prompts[::NUM_GENERATIONS]]
        return seconds + training_seconds(shape, limits, whole, sum(new), again)
    seconds += forward_seconds(shape, limits, whole, sum(new))  # the reference
    seconds += 2 * forward_seconds(shape, limits, whole, 0)  # the reward model and the critic
    updates = training_seconds(shape, limits, whole, sum(new)) + training_seconds(shape, limits, whole, 0)
    return seconds + PPO_EPOCHS * updates
