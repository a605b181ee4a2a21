"""Rounds in alternation, and what is made of them: medians, ratios, and how noisy they were.

It knows nothing of processes or of the work: a side is whatever can be asked for a round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol

from benchmarks.contestant import ContestantError, Round

NOISY = 0.2
"""Processors taken by others, or withheld, above which a round counts as noisy."""


class Side(Protocol):
    """One side of a duel."""

    def round(self, **options: Any) -> Round:
        """Work once."""


def alternation(sides: Sequence[str], num_rounds: int) -> Iterator[str]:
    """The order of play: ours, peer, ours, peer, ...; with a third side each round has all, in this order."""
    for _ in range(num_rounds):
        yield from sides


def duel(
    sides: Mapping[str, Side], num_rounds: int, num_warm_ups: int, options: Mapping[str, Any]
) -> dict[str, list[Round]]:
    """Rounds of every side in alternation, after warm-ups that are dropped.

    Raises `ContestantError` where two sides did not see the same number of tokens and `options` does not say
    `same_tokens: false` (text that ends by chance ends elsewhere on each side).
    """
    given = dict(options)
    same_tokens = given.pop("same_tokens", True)
    played: dict[str, list[Round]] = {name: [] for name in sides}
    for number in range(num_warm_ups + num_rounds):
        for name in alternation(list(sides), 1):
            played[name].append(sides[name].round(number=number, **given))
        if same_tokens:
            check_same_tokens({name: rounds[-1].num_tokens for name, rounds in played.items()})
    return {name: rounds[num_warm_ups:] for name, rounds in played.items()}


def check_same_tokens(counts: Mapping[str, int]) -> None:
    """Raise `ContestantError` unless every side saw the same number of tokens in a round."""
    if len(set(counts.values())) > 1:
        raise ContestantError(f"the sides did not see the same work: tokens in one round are {dict(counts)}")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Medians over the rounds of one side. `rate` is tokens a second."""

    seconds: float
    num_tokens: float
    rate: float
    num_rounds: int
    num_noisy: int

    @staticmethod
    def of(rounds: Sequence[Round]) -> Summary:
        """Medians over quiet rounds where most are quiet, else over all, and the number of noisy ones."""
        quiet = [r for r in rounds if not is_noisy(r)]
        used = quiet if 2 * len(quiet) > len(rounds) else list(rounds)
        return Summary(
            seconds=median(r.seconds for r in used),
            num_tokens=median(r.num_tokens for r in used),
            rate=median(r.num_tokens / r.seconds for r in used),
            num_rounds=len(rounds),
            num_noisy=len(rounds) - len(quiet),
        )


def is_noisy(played: Round) -> bool:
    """Whether others used the processors enough to blur the time."""
    return played.others > NOISY or played.stolen > NOISY


def paired_ratio(ours: Sequence[Round], peer: Sequence[Round]) -> float:
    """How many times as fast we are: the median, over rounds, of the ratio of the rates of neighbouring rounds.

    Neighbours share the weather of the machine, so their ratio is steadier than a ratio of medians.
    """
    rates = [(a.num_tokens / a.seconds) / (b.num_tokens / b.seconds) for a, b in zip(ours, peer, strict=True)]
    return median(rates)
