"""How a dataset is named: a path, `pypi:...`, `reasoning-gym:...` or a hub id, then perhaps a split, then a slice.

    pairs.jsonl[:1300]      folder:train      org/name      org/name:test      org/name/config:train[:10%]

It opens nothing, and imports nothing heavy.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

from meshift.data.reasoning import GYM_PREFIX
from meshift.data.rows import READERS
from meshift.errors import DataError

PACKAGE_PREFIX = "pypi:"
SLICE = re.compile(r"(?P<source>.+)\[(?P<slice>[^\[\]]*)\]\Z", re.DOTALL)
BOUNDS = re.compile(r"\s*(?P<start>-?\d{1,18}%?)?\s*:\s*(?P<stop>-?\d{1,18}%?)?\s*")
SPLIT = re.compile(r"(?P<source>.+):(?P<split>[\w.-]+)\Z", re.DOTALL)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(?P<config>/[\w.-]+)?")

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One end of a slice: a number of rows, or percent of them; below zero it counts from the last row."""

    number: int
    percent: bool

    def row(self, num_rows: int) -> int:
        """The row it stands at. Percentages are rounded to the nearest row, so `[:80%]` and `[80%:]` fit."""
        number = round(num_rows * self.number / 100) if self.percent else self.number
        return max(0, num_rows + number) if number < 0 else min(number, num_rows)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Rows [start, stop) of a dataset, as `[:1300]` or `[90%:]` name them; rows count from 0, without blanks."""

    start: Bound | None
    stop: Bound | None

    @property
    def needs_count(self) -> bool:
        """Whether the number of rows has to be known first."""
        return any(bound.percent or bound.number < 0 for bound in (self.start, self.stop) if bound)

    def of(self, rows: Iterable[T]) -> Iterator[T]:
        """Those of `rows`; what lies behind the slice is not read where that can be helped."""
        if not self.needs_count:
            return islice(rows, self.start.number if self.start else 0, self.stop.number if self.stop else None)
        known = list(rows)
        start = self.start.row(len(known)) if self.start else 0
        return iter(known[start : self.stop.row(len(known)) if self.stop else len(known)])


@dataclass(frozen=True, kw_only=True)
class DatasetName:
    """A name taken apart. Example: "a/b:test[:9]" is `DatasetName(source="a/b", split="test", part=...)`."""

    source: str
    split: str | None = None
    part: Slice | None = None

    @property
    def is_package(self) -> bool:
        """Whether a pinned package holds it."""
        return self.source.startswith(PACKAGE_PREFIX)

    @property
    def is_generated(self) -> bool:
        """Whether rows are made by a generator of `reasoning-gym`."""
        return self.source.startswith(GYM_PREFIX)

    @property
    def path(self) -> Path | None:
        """The local file or folder, which need not exist; None for whatever can be none."""
        elsewhere = self.is_package or self.is_generated or self.hub is not None
        return None if elsewhere else Path(self.source).expanduser()

    @property
    def hub(self) -> tuple[str, str | None] | None:
        """("org/name", config or None), where nothing local has that name and it can be one of the hub's."""
        found = HUB_ID.fullmatch(self.source)
        if found is None or Path(self.source).suffix.lower() in READERS or Path(self.source).exists():
            return None
        config = found["config"] or ""
        return self.source.removesuffix(config), config.removeprefix("/") or None


def parse_name(name: str) -> DatasetName:
    """Take `name` apart. What exists under the whole name is that, brackets and colons included."""
    if not name.strip() or "\0" in name:
        raise DataError(f"the dataset's name {name!r} is blank or no path: give a file, a folder or a hub id.")
    if _exists(name):
        return DatasetName(source=name)
    part = None
    if sliced := SLICE.match(name):
        name, part = sliced["source"], _slice(sliced["slice"], name)
    split = None
    if not _exists(name) and not name.startswith((PACKAGE_PREFIX, GYM_PREFIX)) and (found := SPLIT.match(name)):
        name, split = found["source"], found["split"]
    return DatasetName(source=name, split=split, part=part)


def local_path(name: str) -> Path | None:
    """The local file or folder that a dataset's name stands for, without split and slice; None if it is none."""
    return parse_name(name).path


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # longer than a path may be; the home of a user that does not exist
        return False


def _slice(text: str, name: str) -> Slice:
    found = BOUNDS.fullmatch(text)
    if found is None:
        raise DataError(f"{name}: [{text}] is no slice of rows: write [:1300], [1300:], [100:200] or [:10%].")
    bounds = Slice(start=_bound(found["start"]), stop=_bound(found["stop"]))
    if any(bound.percent and abs(bound.number) > 100 for bound in (bounds.start, bounds.stop) if bound):
        raise DataError(f"{name}: [{text}] goes beyond 100%: use percentages from -100% to 100%.")
    return bounds


def _bound(text: str | None) -> Bound | None:
    return None if text is None else Bound(number=int(text.removesuffix("%")), percent=text.endswith("%"))
