"""Rows of a data file (JSON Lines, JSON, CSV), each with the line it came from, so that errors can name it.

It knows file formats only; what a row's columns mean is the business of `prompts` and `preferences`.
"""

import csv
import difflib
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshift.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record: columns by name, and where it stands. Example: `Row(values={"text": "Hi"},
    where="a.jsonl:3")`.

    `where` is "path:line"; in a JSON list, whose lines mean little, it is "path:row N", counted from 1.
    """

    values: dict[str, Any]
    where: str


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a `.jsonl`, `.json` (a list of objects) or `.csv` file, in order; CSV values are strings.

    Blank lines of JSON Lines are skipped. Raises DataError naming file and line for whatever cannot be read.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        raise DataError(_missing(path))
    if reader is None:
        raise DataError(f"{path} is of no known format: use one of {', '.join(READERS)}.")
    rows = reader(path, _text(path))
    if not rows:
        raise DataError(f"{path} has no rows: give a file with at least one.")
    return rows


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `known`, or a full stop: what ends a sentence on `name`."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def _missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder: name a file in it that ends in {', '.join(READERS)}."
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder: check the path."
    names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in READERS]
    close = difflib.get_close_matches(path.name, names, n=3)
    hint = (
        f"did you mean {' or '.join(str(path.parent / name) for name in close)}?" if close else "check the path."
    )
    return f"{path} does not exist: {hint}"


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8."
        ) from error


def _jsonl(path: Path, text: str) -> list[Row]:
    rows = []
    # Not splitlines(): U+2028 and its like may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: bad JSON ({error}): write one JSON object per line.") from error
        rows.append(_row(values, where))
    return rows


def _json(path: Path, text: str) -> list[Row]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: bad JSON ({error}): write a list of objects.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply
        raise DataError(
            f"{path}:{_line_of_excess(text)}: bad JSON ({error}): write plain numbers and texts."
        ) from error
    if not isinstance(values, list):
        raise DataError(f"{path}:1: this JSON is {_kind(values)}: write a list of objects.")
    return [_row(value, f"{path}:row {number}") for number, value in enumerate(values, start=1)]


def _line_of_excess(text: str) -> int:
    """The line of the longest run of digits or of opening brackets: json does not say where it gave up."""
    longest = max(re.finditer(r"\d+|(?:[\[{]\s*)+", text), key=lambda run: run.end() - run.start())
    return text.count("\n", 0, longest.start()) + 1


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{where}: the row is {_kind(values)}: write a JSON object with one key per column.")
    return Row(values=values, where=where)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _csv(path: Path, text: str) -> list[Row]:
    """A quoted field may span lines, so a row's line is where it begins: one after the last one's end."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if header is None:
                header = _header(path, fields)
            elif fields:
                rows.append(_csv_row(header, fields, f"{path}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: bad CSV ({error}): check the quotes.") from error
    return rows


def _header(path: Path, fields: list[str]) -> list[str]:
    repeated = sorted({name for name in fields if fields.count(name) > 1})
    if repeated or not all(fields):
        fault = f"column {repeated[0]!r} stands there twice" if repeated else "a column has no name"
        raise DataError(f"{path}:1: bad CSV header ({fault}): give each column a name of its own.")
    return fields


def _csv_row(header: list[str], fields: list[str], where: str) -> Row:
    if len(fields) != len(header):
        raise DataError(
            f"{where}: {len(fields)} fields under {len(header)} columns: quote fields that hold commas."
        )
    return Row(values=dict(zip(header, fields, strict=True)), where=where)


READERS: dict[str, Callable[[Path, str], list[Row]]] = {".jsonl": _jsonl, ".json": _json, ".csv": _csv}
