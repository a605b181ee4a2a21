"""Benchmarks inside packages, as JSON Lines files of rows in the benchmark's own columns.

It knows nothing of how they are scored.
"""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RECIPE_VERSION = 1
MBPP_COLUMNS = ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list")


def write_unpacked(member: Path, folder: Path) -> None:
    """`test.jsonl`: the member's rows, which are JSON Lines packed by gzip."""
    _write(folder / "test.jsonl", _packed_rows(member))


def write_rows(member: Path, folder: Path) -> None:
    """`rows.jsonl`: the rows of the member, which are JSON Lines already."""
    lines = member.read_text("utf-8").split("\n")
    _write(folder / "rows.jsonl", (json.loads(line) for line in lines if line.strip()))


def write_mbpp(member: Path, folder: Path) -> None:
    """`test.jsonl`: MBPP's 500 rows for tests out of requests that were made of them for another harness."""
    requests = (row["doc"] for row in _packed_rows(member))
    _write(folder / "test.jsonl", ({name: row[name] for name in MBPP_COLUMNS} for row in requests))


def _packed_rows(member: Path) -> list[dict[str, Any]]:
    with gzip.open(member, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
