"""A plan through several steps whose completions have random lengths: what steps take, how they vary, and why.

Each step is played as `evaluate.py` plays one, with lengths drawn anew from the distribution that `Texts`
describes. It knows nothing of how plans are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import fmean, median

import numpy as np

from meshift.planner.cost import Cost, Costs
from meshift.planner.decoding import course
from meshift.planner.evaluate import Placements, replay
from meshift.planner.figures import figure
from meshift.planner.hardware import Hardware
from meshift.planner.workload import PlannedCall, Step, Texts

NUM_SLOWEST = 2
"""Data ranks of a generation that are costed, of those with the longest completion, and with the most tokens."""


@dataclass(frozen=True, kw_only=True)
class DrawnTexts(Texts):
    """Texts of one data rank, whose completion lengths are given."""

    given: tuple[int, ...]

    def alive(self, position: float) -> float:
        """The share of these that have more than so many tokens."""
        return sum(length > position for length in self.given) / len(self.given)

    def of_longest(self, count: int, ranks: int) -> list[int]:
        """All; of several sessions the one that has the longest, with an even share of the others."""
        del ranks  # which of them it is has been decided
        if count >= len(self.given):
            return list(self.given)
        longest_first = sorted(self.given, reverse=True)
        return [
            longest_first[0],
            *(longest_first[int((i + 0.5) * len(longest_first) / count)] for i in range(1, count)),
        ]

    def deal(self, count: int, ranks: int, seed: int) -> list[list[int]]:
        """The same, in an order of arrival."""
        return [np.random.default_rng(seed).permutation(self.of_longest(count, ranks)).tolist()]


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Seconds of each step; of one whose completions all have the mean length; and how generation thins out.

    `half` is the share of decode steps after which half of a rank's completions have ended.
    """

    seconds: tuple[float, ...]
    even: float
    half: float

    @property
    def median(self) -> float:
        """Of the steps."""
        return median(self.seconds)

    @property
    def cost_of_tail(self) -> float:
        """Of a step, the share that it takes for completions that are longer than the mean."""
        return max(0.0, 1 - self.even / self.median)


def simulate(
    step: Step,
    hardware: Hardware,
    placements: Placements,
    *,
    num_steps: int = 20,
    seed: int = 0,
    streaming: bool = True,
) -> Simulated | None:
    """Play so many steps; None where nothing is generated, since every step is then the same."""
    generations = [call for call in step.calls if call.kind == "generate"]
    if not generations:
        return None
    used = {device for kinds in placements.values() for p in kinds.values() for device in p.mesh.devices}
    drawing = _Drawing(step, hardware.shared_by(len(used)), placements)
    costs = (drawing.costs(np.random.default_rng((seed, number))) for number in range(num_steps))
    played = replay(step, hardware, placements, costs, streaming=streaming)
    seconds = tuple(max(event.end for event in events) for events in played)
    (even,) = replay(step, hardware, placements, [drawing.even()], streaming=streaming)
    half = fmean(drawing.half(call) for call in generations)
    return Simulated(seconds=seconds, even=max(event.end for event in even), half=half)


class _Drawing:
    """Costs of a step's calls for lengths that are drawn."""

    def __init__(self, step: Step, hardware: Hardware, placements: Placements) -> None:
        self.step, self.placements = step, placements
        self._costs = {name: Costs(role, hardware) for name, role in step.roles.items()}

    def costs(self, draw: np.random.Generator) -> dict[str, Cost]:
        """Of every call: generations by their slowest rank, the others by how many tokens there are in all.

        All lengths are drawn first: a step that draws ahead has its generation last.
        """
        drawn = {call.name: self._drawn(call, draw) for call in self.step.calls if call.kind == "generate"}
        means = {
            _texts_of(call): float(np.concatenate(drawn[call.name]).mean())
            for call in self.step.calls
            if call.name in drawn
        }
        found: dict[str, Cost] = {}
        for call in self.step.calls:
            if call.name in drawn:
                found[call.name] = self._slowest(call, drawn[call.name])
            else:
                found[call.name] = self._with_mean(call, means.get(_texts_of(call)) or fmean(means.values()))
        return found

    def even(self) -> dict[str, Cost]:
        """Where all completions have the mean length."""
        return {
            call.name: self._of(call, (max(1, round(call.texts.completion)),) * self._own(call))
            for call in self.step.calls
            if call.kind == "generate"
        }

    def half(self, call: PlannedCall) -> float:
        """Of a generation's decode steps, the share after which half of a rank's completions have ended."""
        own, ranks = self._own(call), self.placements[call.role][call.kind].layout.data
        ended = course(call.texts, own, min(call.num_slots, own), ranks).ended
        first = next(i for i, share in enumerate(ended) if share >= 0.5)
        return first / (len(ended) - 1)

    def _own(self, call: PlannedCall) -> int:
        """Sequences of a data rank."""
        return max(1, -(-call.texts.num_sequences // self.placements[call.role][call.kind].layout.data))

    def _drawn(self, call: PlannedCall, draw: np.random.Generator) -> list[np.ndarray]:
        """Lengths of every data rank's completions, from the truncated exponential distribution."""
        texts, own = call.texts, self._own(call)
        num_ranks = self.placements[call.role][call.kind].layout.data
        if texts.rate == 0.0:
            return [np.full(own, texts.longest_completion)] * num_ranks
        lengths = np.ceil(draw.exponential(1 / texts.rate, size=(num_ranks, own)))
        return list(np.minimum(lengths, texts.longest_completion).astype(int))

    def _slowest(self, call: PlannedCall, ranks: list[np.ndarray]) -> Cost:
        most = sorted(range(len(ranks)), key=lambda i: -int(ranks[i].sum()))[:NUM_SLOWEST]
        longest = sorted(range(len(ranks)), key=lambda i: -int(ranks[i].max()))[:NUM_SLOWEST]
        costs = [self._of(call, tuple(ranks[i].tolist())) for i in {*most, *longest}]
        return max(costs, key=lambda cost: cost.seconds)

    def _of(self, call: PlannedCall, given: tuple[int, ...]) -> Cost:
        fields = {name: getattr(call.texts, name) for name in Texts.__dataclass_fields__}
        texts = DrawnTexts(**{**fields, "completion": fmean(given), "given": given})
        layout = self.placements[call.role][call.kind].layout
        return self._costs[call.role].of(replace(call, texts=texts), layout)

    def _with_mean(self, call: PlannedCall, mean: float) -> Cost:
        texts = replace(call.texts, completion=mean)
        read = call.num_read if call.num_read == 1.0 else mean
        layout = self.placements[call.role][call.kind].layout
        return self._costs[call.role].of(replace(call, texts=texts, num_read=read), layout)


def _texts_of(call: PlannedCall) -> tuple[int, int]:
    """What tells a step's texts apart: those that are drawn together have the same."""
    return call.texts.num_prompts, call.texts.per_prompt


def in_sentences(found: Simulated) -> Iterator[str]:
    """The spread of steps, and what the tail of lengths costs."""
    yield (
        f"{len(found.seconds)} steps with random lengths take {figure(found.median)} s in the median, "
        f"{figure(min(found.seconds))} to {figure(max(found.seconds))} s."
    )
    yield (
        f"Were all completions as long as the mean, a step would take {figure(found.even)} s: longer ones cost "
        f"{found.cost_of_tail:.0%} of it. Half of a device's completions have ended after {found.half:.0%} of its "
        "decode steps."
    )
