"""What reward functions return, read: numbers per sample, what was wrong with which, and further numbers to log.

It knows nothing of how functions are called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshift.rewards.signatures import Flavour

LARGEST = 3.4e38  # of a reward: scores are fp32
TIMEOUT = "timeout"
SCORE_KEYS = {"verl": ("score", "reward"), "OpenRLHF": ("rewards", "scores")}


@dataclass(frozen=True)
class Fault:
    """What went wrong ("raised KeyError: 'x'") and of which kind it is: the exception's name, "timeout", ..."""

    what: str
    kind: str


class CallError(Exception):
    """A call gave no scores. `can_locate`: calling it on fewer samples may tell which of them it fails on."""

    def __init__(self, fault: Fault, *, can_locate: bool = True) -> None:
        super().__init__(fault.what)
        self.fault = fault
        self.can_locate = can_locate


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One value per sample, None where there is none; `faults` by sample; `extras` are numbers to be averaged.

    `of_batch` says that the faults are those of a call on all samples together, and no sample's own. `excused` is
    what went wrong with samples that have a value all the same.
    """

    values: list[float | None]
    faults: dict[int, Fault] = field(default_factory=dict)
    extras: dict[str, list[float]] = field(default_factory=dict)
    of_batch: bool = False
    excused: dict[int, Fault] = field(default_factory=dict)

    @staticmethod
    def all_failed(num_samples: int, fault: Fault, *, of_batch: bool) -> Scores:
        """No value for any sample, for the same reason."""
        faults = dict.fromkeys(range(num_samples), fault)
        return Scores(values=[None] * num_samples, faults=faults, of_batch=of_batch)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a pipe."""
        faults = [[i, fault.what, fault.kind] for i, fault in self.faults.items()]
        return {"values": self.values, "faults": faults, "extras": self.extras}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Scores:
        """What `to_json` gave."""
        faults = {i: Fault(what, kind) for i, what, kind in data["faults"]}
        return Scores(values=data["values"], faults=faults, extras=data["extras"])


def read_scores(result: Any, num_samples: int, flavour: Flavour) -> Scores:
    """What a call on a batch returned. Raises `CallError` where it is no list of `num_samples` items."""
    extras: dict[str, list[float]] = {}
    if flavour == "OpenRLHF" and isinstance(result, Mapping):
        result, extras = _openrlhf(result)
    rows = _listed(result)
    if rows is None:
        kind = type(result).__name__
        raise CallError(Fault(f"returned {kind} instead of a list of numbers, one per completion", "type"))
    if len(rows) != num_samples:
        raise CallError(Fault(f"returned {len(rows)} values for {num_samples} completions", "length"))
    return collect([read_score(row, flavour) for row in rows], extras)


def read_score(result: Any, flavour: Flavour) -> tuple[float | Fault | None, dict[str, list[float]]]:
    """One sample's value, or what is wrong with it, and its extras. None is an answer in TRL alone.

    Functions of Meshift's own may put a `Fault` in a sample's place.
    """
    extras: dict[str, list[float]] = {}
    if isinstance(result, Fault):
        return result, extras
    if flavour in ("verl", "verl batch") and isinstance(result, Mapping):
        key = next((k for k in SCORE_KEYS["verl"] if k in result), None)
        if key is None:
            return Fault(f"returned a dictionary of {sorted(map(str, result))} without 'score'", "value"), extras
        extras = {str(k): numbers_of(v) for k, v in result.items() if k != key}
        result = result[key]
    if result is None and flavour == "TRL":
        return None, extras
    return _number(result), extras


def collect(
    results: Iterable[tuple[float | Fault | None, dict[str, list[float]]]],
    extras: Mapping[str, list[float]] | None = None,
) -> Scores:
    """The results of single samples as one."""
    values: list[float | None] = []
    faults: dict[int, Fault] = {}
    merged = {key: list(numbers) for key, numbers in (extras or {}).items()}
    for index, (value, more) in enumerate(results):
        if isinstance(value, Fault):
            faults[index] = value
        values.append(None if isinstance(value, Fault) else value)
        for key, numbers in more.items():
            merged.setdefault(key, []).extend(numbers)
    return Scores(values=values, faults=faults, extras=merged)


def numbers_of(value: Any) -> list[float]:
    """The finite numbers in a value that is to be logged: one, or a list; of anything else none."""
    rows = _listed(value)
    read = [_number(row) for row in ([value] if rows is None else rows)]
    return [number for number in read if not isinstance(number, Fault)]


def _openrlhf(result: Mapping[Any, Any]) -> tuple[Any, dict[str, list[float]]]:
    """The rewards, and the numbers to log: `extra_logs`, and `scores` where they are not the rewards."""
    keys = [key for key in SCORE_KEYS["OpenRLHF"] if result.get(key) is not None]
    if not keys:
        found = sorted(map(str, result))
        raise CallError(Fault(f"returned a dictionary of {found} without 'rewards' or 'scores'", "type"))
    logs = result.get("extra_logs")
    extras = {str(k): numbers_of(v) for k, v in logs.items()} if isinstance(logs, Mapping) else {}
    return result[keys[0]], extras | {key: numbers_of(result[key]) for key in keys[1:]}


def _listed(result: Any) -> list[Any] | None:
    """The items of a list, a tensor or an array, or None for what has none."""
    if hasattr(result, "tolist"):
        result = result.tolist()
    return list(result) if isinstance(result, list | tuple) else None


def _number(raw: Any) -> float | Fault:
    """The value as a finite number; true and false are 1 and 0."""
    if not hasattr(type(raw), "__float__") and not hasattr(type(raw), "__index__"):
        return Fault(f"returned {raw!r:.60}, which is no number,", "value")
    try:
        value = float(raw)
    except (TypeError, ValueError, RuntimeError, OverflowError):  # torch: RuntimeError for several elements
        return Fault(f"returned {raw!r:.60}, which is no number,", "value")
    return value if abs(value) <= LARGEST else Fault(f"returned {value}", "nan" if math.isnan(value) else "inf")
