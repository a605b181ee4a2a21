"""One row of the result: a work, us, a peer, and how both compare to each other and to the machine.

It is what the JSON and the table are made of; it knows nothing of how the figures came about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.contestant import Round
from benchmarks.rounds import Summary, paired_ratio
from benchmarks.works import Work


@dataclass(frozen=True, kw_only=True)
class Row:
    """`ours` and `peer` are in `unit`; `ratio` is how many times as fast we are, whatever the unit. `of_limit` is
    our share of what the hardware allows (`limits.py`). Memory is the peak of each side's processes, in 1e9 bytes.
    A peer that did not run leaves its figures None and says why in `note`."""

    work: str
    peer_name: str
    unit: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    of_limit: float | None = None
    peak_memory_gb: float | None = None
    peer_memory_gb: float | None = None
    rounds: int = 0
    num_noisy: int = 0
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Played:
    """One side of a duel: what it said of itself, its rounds, its peak memory."""

    about: Mapping[str, Any]
    rounds: Sequence[Round]
    memory_gb: float


def row_of(work: Work, peer_name: str, variant: str, ours: Played, peer: Played, limit_seconds: float) -> Row:
    """The row of a duel. `limit_seconds` is what the limits allow for one round of ours."""
    own, other = Summary.of(ours.rounds), Summary.of(peer.rounds)
    return Row(
        work=work.name,
        peer_name=peer_name,
        unit=work.unit,
        ours=in_unit(work, own),
        peer=in_unit(work, other),
        ratio=paired_ratio(ours.rounds, peer.rounds),
        of_limit=limit_seconds / own.seconds,
        peak_memory_gb=ours.memory_gb,
        peer_memory_gb=peer.memory_gb,
        rounds=own.num_rounds,
        num_noisy=max(own.num_noisy, other.num_noisy),
        note=variant,
        details={
            "ours": side_details(work, ours),
            "peer": side_details(work, peer),
            "limit_seconds": limit_seconds,
        },
    )


def missing(work: Work, peer_name: str, why: str) -> Row:
    """The row of a peer that did not run."""
    return Row(work=work.name, peer_name=peer_name, unit=work.unit, note=why)


def alone(work: Work, ours: Played, limit_seconds: float) -> Row:
    """The row of a work that no peer was asked for."""
    own = Summary.of(ours.rounds)
    return Row(
        work=work.name,
        peer_name="",
        unit=work.unit,
        ours=in_unit(work, own),
        of_limit=limit_seconds / own.seconds,
        peak_memory_gb=ours.memory_gb,
        rounds=own.num_rounds,
        num_noisy=own.num_noisy,
        details={"ours": side_details(work, ours), "limit_seconds": limit_seconds},
    )


def in_unit(work: Work, summary: Summary) -> float:
    """Tokens a second, or seconds a step."""
    return summary.seconds if work.unit == "s/step" else summary.rate


def side_details(work: Work, played: Played) -> dict[str, Any]:
    """Everything else that a reader may want to check: every round, settings, versions, the split by call."""
    summary = Summary.of(played.rounds)
    calls = [r.extra["calls"] for r in played.rounds if "calls" in r.extra]
    names = {name for split in calls for name in split}
    return {
        "settings": played.about.get("settings", ""),
        "versions": played.about.get("versions", {}),
        "seconds": summary.seconds,
        "num_tokens": summary.num_tokens,
        "samples_per_s": work.batch / summary.seconds,
        "calls": {name: median(split.get(name, 0.0) for split in calls) for name in sorted(names)},
        "rounds": [
            {"seconds": r.seconds, "num_tokens": r.num_tokens, "others": r.others, "stolen": r.stolen}
            for r in played.rounds
        ],
    }


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal."""
    drawn = Table(title="Meshift and its peers on one device", title_justify="left")
    for heading in ("work", "peer", "ours", "peer's", "", "ratio", "of limit", "GB", "peer's GB", "noisy", "note"):
        right = heading in ("ours", "peer's", "ratio", "of limit", "GB", "peer's GB", "noisy")
        drawn.add_column(heading, justify="right" if right else "left")
    for row in rows:
        drawn.add_row(*cells(row))
    return drawn


def cells(row: Row) -> list[str]:
    """A row's texts; a figure that is not there is a blank."""
    return [
        row.work,
        row.peer_name,
        _number(row.ours),
        _number(row.peer),
        row.unit,
        "" if row.ratio is None else f"{row.ratio:.2f}x",
        "" if row.of_limit is None else f"{row.of_limit:.0%}",
        "" if row.peak_memory_gb is None else f"{row.peak_memory_gb:.1f}",
        "" if row.peer_memory_gb is None else f"{row.peer_memory_gb:.1f}",
        f"{row.num_noisy}/{row.rounds}" if row.rounds else "",
        row.note,
    ]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
