"""What was measured on a kind of device: rates of products, of memory and of messages, and what crowding costs.

`meshift profile` writes it; sizes that were not measured are interpolated, in logarithms, and beyond the largest
and the smallest one the nearest speaks. It knows nothing of how anything is measured.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import exp, log
from types import MappingProxyType
from typing import Any

from meshift.errors import ConfigError

Points = Sequence[tuple[float, float]]
PRODUCTS = ("forward", "backward", "decode", "prompt", "read", "learn", "pass", "draw")
"""Kinds of products: a layer's passes (without gradients, back, one token each, prompts in the generator), and the
head's: log-probs, learning with and without a gradient of its own weights, logits with a draw from them."""
BESIDE = ("frozen", "beside", "beside_back")
"""Kinds of products where layers have adapters: back through a layer whose matrices have no gradients, and what
its adapters take more, forward (as `forward`, without gradients) and back."""
NEAR = 32
"""Tokens of the cache that a measured decode step reads: what more of them take is the speed `cache`'s to say."""
SPEEDS = ("update", "share", "pack", "check", "cache", "copy")
"""Kinds of passes over memory: an update, what it takes more where ranks share one (numbers a second), packing
weights, fingerprints, the cache of a decode step, and copies (bytes a second)."""

IDLE = 0.2
"""Processors that others may take: with more, what is measured is too slow to go by."""


@dataclass(frozen=True, kw_only=True)
class Product:
    """Rows through matrices of so many numbers: operations a second that one process reached with its threads.

    Operations are those of the forward pass, backward too. `rank` is of adapters, whose numbers these are then.
    """

    kind: str
    dtype: str
    threads: int
    numbers: float
    rows: float
    rate: float
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Message:
    """A collective of `members`, all of them in groups of as many, of `among` processes that were at it.

    `kind`: `sum` (of so many bytes), `late` (the same after products, which not all end at once), `gather` (so
    many in all), `send`.
    """

    kind: str
    members: int
    among: int
    num_bytes: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """All of it. `speeds["update/float32"][threads]` are numbers or bytes a second of one process.

    `crowding[kind][k]` is how many times as long a thing takes one process while k processes do it at the same
    time. `cores`: processors that processes of the host share; 0: each process has a device of its own.
    `call` is seconds for what every call does beside products; `others` the most processors that other work took
    where the profile looked for it.
    """

    products: tuple[Product, ...] = ()
    messages: tuple[Message, ...] = ()
    speeds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    crowding: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cores: int = 0
    call: float = 0.0
    model: str = ""
    others: float = 0.0

    @property
    def is_disturbed(self) -> bool:
        """Whether other work ran beside it."""
        return self.others > IDLE

    def threads_of(self, num_processes: int) -> int:
        """Of each of so many processes on a host, as the launcher shares processors out."""
        return max(1, self.cores // max(1, num_processes))

    def rate(self, kind: str, dtype: str, threads: int, numbers: float, rows: float, rank: int = 0) -> float:
        """Operations a second. Raises `ConfigError` for a type that was not measured."""
        lines = self._lines.get((kind, rank, dtype, self._nearest(kind, dtype, threads)))
        if lines is None:
            raise _lacking(kind, dtype, sorted({f"{one.kind}/{one.dtype}" for one in self.products}))
        below = [(size, _beyond(line, rows)) for size, line in lines]
        return _between(below, numbers)

    def has(self, kind: str, dtype: str) -> bool:
        """Whether such products were measured."""
        return any(one[0] == kind and one[2] == dtype for one in self._lines)

    def adapters(self, kind: str, dtype: str, threads: int, width: float, rows: float, rank: int) -> float:
        """Seconds of a layer's adapters, which have `width` numbers in each of `rank` rows and columns.

        Passes over rows cost the same at every rank, products grow with it: between two ranks that were measured,
        and beyond them, a straight line.
        """
        known = sorted({one[1] for one in self._lines if one[0] == kind and one[2] == dtype})
        points = [
            (float(r), 2.0 * r * width * rows / self.rate(kind, dtype, threads, r * width, rows, r)) for r in known
        ]
        (low, least), (high, most) = points[0], points[-1]
        if len(points) > 1 and not low <= rank <= high:
            beyond = max(0.0, most - least) / (high - low) * (rank - (high if rank > high else low))
            return max(least / 2, (most if rank > high else least) + beyond)
        return _straight(points, float(rank))

    def message(self, kind: str, num_bytes: float, members: int, among: int) -> float:
        """Seconds. Of group sizes that were not measured, the nearest stands, by rings' steps."""
        if kind == "late" and not any(one.kind == kind for one in self.messages):
            kind = "sum"
        known = sorted({(one.members, one.among) for one in self.messages if one.kind == kind})
        if not known:
            raise ConfigError("the profile has no messages; measure them with `meshift profile`")
        nearest = min(known, key=lambda pair: (abs(log(pair[0] / members)), abs(log(pair[1] / among))))
        line = self._sent[kind, *nearest]
        found = _between(line, num_bytes)
        if num_bytes > line[-1][0]:
            found *= num_bytes / line[-1][0]
        steps = max(1, members - 1) / max(1, nearest[0] - 1)
        return found * (steps if kind in ("sum", "late") else 1.0)

    def speed(self, kind: str, dtype: str, threads: int) -> float:
        """Numbers or bytes a second. Raises `ConfigError` for a type that was not measured."""
        found = self.speeds.get(f"{kind}/{dtype}")
        if found is None:
            raise _lacking(kind, dtype, sorted(self.speeds))
        return _between(sorted((float(key), value) for key, value in found.items()), float(threads))

    def slow(self, kind: str, busy: float) -> float:
        """How many times as long it takes while so many processes are at it. More than were measured share."""
        found = sorted((float(key), value) for key, value in self.crowding.get(kind, {}).items())
        if not found or busy <= 1:
            return 1.0
        most, slowest = found[-1]
        if busy > most:
            return slowest * (busy / most if self.cores else 1.0)
        return _straight(found, busy)

    @cached_property
    def _lines(self) -> Mapping[tuple[str, int, str, int], list[tuple[float, Points]]]:
        """By kind, rank, type and threads, the sizes of matrices in order, each with its rates by rows."""
        found: dict[tuple[str, int, str, int], dict[float, list[tuple[float, float]]]] = {}
        for one in self.products:
            lines = found.setdefault((one.kind, one.rank, one.dtype, one.threads), {})
            lines.setdefault(one.numbers, []).append((one.rows, one.rate))
        return {key: [(size, sorted(lines[size])) for size in sorted(lines)] for key, lines in found.items()}

    @cached_property
    def _sent(self) -> Mapping[tuple[str, int, int], Points]:
        found: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        for one in self.messages:
            found.setdefault((one.kind, one.members, one.among), []).append((one.num_bytes, one.seconds))
        return {key: sorted(points) for key, points in found.items()}

    def _nearest(self, kind: str, dtype: str, threads: int) -> int:
        known = {found[3] for found in self._lines if (found[0], found[2]) == (kind, dtype)}
        return min(known, key=lambda one: abs(one - threads), default=threads)

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "others": self.others,
            "cores": self.cores,
            "call": self.call,
            "speeds": {kind: dict(found) for kind, found in self.speeds.items()},
            "crowding": {kind: dict(found) for kind, found in self.crowding.items()},
            "products": [asdict(one) for one in self.products],
            "messages": [asdict(one) for one in self.messages],
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Profile:
        """What `values` gave. Raises `TypeError` for keys that are missing or unknown."""
        given = dict(values)
        given["products"] = tuple(Product(**one) for one in given.get("products", ()))
        given["messages"] = tuple(Message(**one) for one in given.get("messages", ()))
        for key in ("speeds", "crowding"):
            given[key] = MappingProxyType({name: dict(one) for name, one in given.get(key, {}).items()})
        return cls(**given)


def _beyond(line: Points, rows: float) -> float:
    """The rate at so many rows: below the fewest measured, a pass takes as long as with these."""
    if rows < line[0][0]:
        return line[0][1] * max(rows, 1e-9) / line[0][0]
    return _between(line, rows)


def _between(points: Points, at: float) -> float:
    """Between the two points beside `at`, a straight line in logarithms; outside, the first or the last."""
    i = bisect_right([x for x, _ in points], at)
    if i == 0 or i == len(points):
        return points[max(0, i - 1)][1]
    (a, low), (b, high) = points[i - 1], points[i]
    part = log(at / a) / log(b / a)
    return exp(log(low) + part * (log(high) - log(low)))


def _straight(points: Points, at: float) -> float:
    i = bisect_right([x for x, _ in points], at)
    if i == 0 or i == len(points):
        return points[max(0, i - 1)][1]
    (a, low), (b, high) = points[i - 1], points[i]
    return low + (high - low) * (at - a) / (b - a)


def _lacking(kind: str, dtype: str, known: Sequence[str]) -> ConfigError:
    types = sorted({name.partition("/")[2] for name in known}) or ["nothing"]
    return ConfigError(
        f"the profile has {', '.join(types)}, and nothing of {kind} in {dtype}; measure it with "
        f"`meshift profile --dtype {dtype}`"
    )
