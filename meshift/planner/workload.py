"""What a step asks for, as numbers: the roles' models, the texts, and the calls with what each waits for.

It knows nothing of devices, of layouts or of how long anything takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil, exp, log
from typing import Any, Literal

import numpy as np

from meshift.config.sections import TrainableConfig
from meshift.graph.calls import Kind
from meshift.models.config import DecoderConfig, HeadKind

ComputeType = Literal["float32", "bfloat16"]
WIDTHS = {"float32": 4, "bfloat16": 2}
Windows = tuple[int | None, ...]
"""For each layer how many positions a token sees, as `DecoderConfig.windows` has them; at least one."""
MAX_STEPS = 8192
"""In which a completion is gone through."""
NUM_LAST = 3
"""Ranks with the most tokens, and with the longest sequences, among which the last one is looked for."""


@dataclass(frozen=True, kw_only=True)
class Role:
    """One role's model and how it runs. `passes` has its micro-batches; `trained` says whether it is updated.

    `averaged`: it follows another role (EMA), which takes fp32 averages. `offloaded`: it leaves the device while
    no call uses it. `borrows`: its weights are those that another role's adapters leave as they are.
    """

    name: str
    config: DecoderConfig
    head: HeadKind
    dtype: ComputeType = "bfloat16"
    trained: bool = False
    averaged: bool = False
    offloaded: bool = False
    borrows: bool = False
    passes: TrainableConfig = field(default_factory=TrainableConfig)

    @property
    def width(self) -> int:
        """Bytes of one weight or activation."""
        return WIDTHS[self.dtype]

    @property
    def num_frozen_layers(self) -> int:
        """The embedding and this many layers keep their weights; all of them where nothing is trained."""
        return self.passes.num_frozen_layers


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of one call: `num_prompts` prompts with `per_prompt` completions each (two, for pairs).

    Tokens: `prompt` is the mean, `completion` the mean of a long-tailed distribution that `longest_completion`
    cuts off. Completion lengths are taken to end at every token with the same probability (a truncated geometric
    distribution, as exponential), so that a mean and a limit say all.
    """

    num_prompts: int
    prompt: float
    longest_prompt: int
    completion: float
    longest_completion: int
    per_prompt: int = 1

    @property
    def num_sequences(self) -> int:
        """Completions of all prompts."""
        return self.num_prompts * self.per_prompt

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that there may be."""
        return self.longest_prompt + self.longest_completion

    def num_rows(self, *, share_prefixes: bool) -> float:
        """Tokens that run in a pass over all sequences; with `share_prefixes` each prompt once."""
        prompts = self.num_prompts if share_prefixes else self.num_sequences
        return prompts * self.prompt + self.num_sequences * self.completion

    def num_pairs(self, windows: Windows, *, share_prefixes: bool) -> float:
        """Pairs of a row and one that it sees, itself included, in a pass over all sequences; mean of the layers.

        By the distribution of lengths, not by their mean: long completions see more in each of their rows.
        """
        prompts = self.num_prompts if share_prefixes else self.num_sequences
        return prompts * self.prompt_pairs(windows) + self.num_sequences * _own_pairs(self, windows)

    def prompt_pairs(self, windows: Windows) -> float:
        """Such pairs within one prompt."""
        seen = [self.prompt if window is None else min(self.prompt, window) for window in windows]
        return sum(some * (some + 1) / 2 + (self.prompt - some) * some for some in seen) / len(seen)

    @cached_property
    def rate(self) -> float:
        """Of the exponential distribution, cut off at `longest_completion`, with this mean; 0: all are longest."""
        most = float(self.longest_completion)
        if self.completion >= 0.999 * most:
            return 0.0
        low, high = 1e-9 / most, 1e3 / self.completion
        for _ in range(100):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if (1 - exp(-middle * most)) / middle > self.completion else (low, middle)
        return low

    def alive(self, position: float) -> float:
        """The share of completions that have more than this many tokens."""
        return 0.0 if position >= self.longest_completion else exp(-self.rate * position)

    def lengths(self, count: int) -> list[int]:
        """Completion lengths of `count` sequences: evenly spaced quantiles, the longest first."""
        shares = [(i + 0.5) / count for i in range(count)]
        if self.rate == 0.0:
            return [self.longest_completion] * count
        return [min(self.longest_completion, max(1, ceil(-log(share) / self.rate))) for share in shares]

    def longest_of(self, count: int) -> int:
        """The mean of the longest completion of so many."""
        if self.rate == 0.0:
            return self.longest_completion
        ended = 1 - np.exp(-self.rate * np.arange(self.longest_completion))
        return max(1, round(float((1 - ended**count).sum())))

    def of_longest(self, count: int, ranks: int) -> list[int]:
        """Lengths of that one of `ranks` that has the longest sequence, and of the others an even share."""
        most = self.longest_of(count * ranks)
        return [most, *(min(most, length) for length in self.lengths(count)[1:])]

    def deal(self, count: int, ranks: int, seed: int) -> list[list[int]]:
        """All sequences dealt at random: lengths, in order of arrival, of ranks that may be the last to end.

        Those are the ones with the most tokens, and with the longest sequences.
        """
        every = np.array([self.longest_of(count * ranks), *self.lengths(count * ranks)[1:]])
        dealt = np.random.default_rng(seed).permutation(every).reshape(ranks, count)
        last = {*np.argsort(dealt.sum(1))[-NUM_LAST:].tolist(), *np.argsort(dealt.max(1))[-NUM_LAST:].tolist()}
        return [dealt[rank].tolist() for rank in sorted(last)]


@lru_cache(maxsize=4096)
def _own_pairs(texts: Texts, windows: Windows) -> float:
    """Pairs of a completion's rows and those that they see, on average over its length and the layers.

    Each row by the share of completions that are so long, in steps of a token, or of a few in long texts.
    """
    edges = np.linspace(0, texts.longest_completion, min(texts.longest_completion, MAX_STEPS) + 1)
    there = edges if texts.rate == 0.0 else -np.exp(-texts.rate * edges) / texts.rate
    rows = np.diff(there)
    rows *= texts.completion / rows.sum()
    sees = texts.prompt + (edges[1:] + edges[:-1] + 1) / 2
    counts = Counter(windows)
    pairs = (n * (rows * (sees if w is None else np.minimum(sees, w))).sum() for w, n in counts.items())
    return float(sum(pairs)) / len(windows)


@dataclass(frozen=True, kw_only=True)
class PlannedCall:
    """A model call as the planner sees it: which texts, how often, and which calls it waits for.

    `num_passes` goes through all texts, `num_updates` optimizer steps in each. `num_read` is how many rows of a
    sequence the head reads: completion tokens, or 1. `num_slots`: sequences that one engine decodes at a time.
    `metric` is the call in whose `timing_s/` a run counts its seconds, where that is another (rounds of a loop).
    `factor` is how many times as long as the model of costs says it took where it was measured.
    """

    name: str
    role: str
    kind: Kind
    texts: Texts
    waits: frozenset[str] = frozenset()
    num_passes: int = 1
    num_updates: int = 1
    num_read: float = 1.0
    num_slots: int = 64
    metric: str = ""
    factor: float = 1.0

    @property
    def timed_as(self) -> str:
        """The call in a run's metrics that this one is, or is a part of."""
        return self.metric or self.name


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """`target` follows `source`, every `every` steps, after the call `after`."""

    source: str
    target: str
    every: int = 1


@dataclass(frozen=True, kw_only=True)
class Step:
    """All model calls of a step in program order, and the roles that they use.

    With `draws_ahead` new weights move when all calls have ended: some draw for a later step, by older ones.
    """

    roles: Mapping[str, Role]
    calls: tuple[PlannedCall, ...]
    mixings: tuple[Mixing, ...] = ()
    draws_ahead: bool = False

    def with_slots(self, role: str, slots: int) -> Step:
        """With so many sequences decoded at a time by each engine of a role."""
        calls = (
            replace(call, num_slots=slots) if (call.role, call.kind) == (role, "generate") else call
            for call in self.calls
        )
        return replace(self, calls=tuple(calls))

    def with_offloaded(self, names: Collection[str]) -> Step:
        """With these roles offloaded, and no other."""
        return self._with_roles(lambda role: replace(role, offloaded=role.name in names))

    def with_passes(self, names: Collection[str], **changes: Any) -> Step:
        """With other keys of how these roles run their passes."""

        def changed(role: Role) -> Role:
            return replace(role, passes=role.passes.model_copy(update=changes)) if role.name in names else role

        return self._with_roles(changed)

    def _with_roles(self, changed: Callable[[Role], Role]) -> Step:
        return replace(self, roles={name: changed(role) for name, role in self.roles.items()})

    def as_measured(self, factors: Mapping[str, float]) -> Step:
        """With each call as many times as long as a run measured it, by the name under which it times it."""
        calls = (replace(call, factor=factors.get(call.timed_as, 1.0)) for call in self.calls)
        return replace(self, calls=tuple(calls))
