"""Rows of a data file (JSON Lines, JSON, CSV, Parquet), each with the line it came from, for errors to name.

It knows file formats only; what a row's columns mean is the business of `prompts`, `preferences` and their like.
"""

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshift.data.parquet import num_parquet_rows, parquet_values
from meshift.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROWS_START = re.compile(r'\A\s*\[|"data"\s*:\s*\[')
BETWEEN_ROWS = re.compile(r"[\s,]*")
BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One record: columns by name, and where it stands. Example: `Row(values={"text": "Hi"},
    where="a.jsonl:3")`.

    `where` is "path:line"; where lines mean little (JSON lists, Parquet), "path:row N", counted from 1.
    """

    values: dict[str, Any]
    where: str


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a file that `iter_rows` reads. Raises DataError, also where there is none."""
    rows = list(iter_rows(path))
    if not rows:
        raise no_rows(path)
    return rows


def iter_rows(path: str | Path) -> Iterator[Row]:
    """The rows of a `.jsonl`, `.json`, `.csv` or `.parquet` file, or of `.gz`: JSON Lines packed by gzip.

    A `.json` file holds a list of objects, {"data": a list}, or JSON Lines under another name. JSON Lines and
    Parquet are read bit by bit. Blank lines of JSON Lines are skipped; CSV values are texts, but for JSON objects
    and lists of objects. Raises DataError naming file and line for whatever cannot be read, when the reading gets
    there.
    """
    path = Path(path).expanduser()
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        raise DataError(_missing(path))
    if reader is None:
        raise DataError(f"{path} is of no known format: use one of {', '.join(READERS)}.")
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error


def count_rows(path: Path) -> int | None:
    """Lines of a `.jsonl` file, rows of a `.parquet` one, without reading them; None of others."""
    if path.suffix.lower() == ".parquet":
        return num_parquet_rows(path)
    if path.suffix.lower() != ".jsonl":
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))


def no_rows(name: str | Path) -> DataError:
    """What to say of a dataset without rows."""
    return DataError(f"{name} has no rows: give a file with at least one.")


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


def _decode(data: bytes, path: Path, first_line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8."
        ) from error


def _text(path: Path) -> str:
    return _decode(path.read_bytes().removeprefix(BYTE_ORDER_MARK), path, 1)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:  # in bytes, lines end at \n alone; U+2028 and its like may stand in a string
        yield from _lines(file, path)


def _packed(path: Path) -> Iterator[Row]:
    try:
        with gzip.open(path, "rb") as file:
            yield from _lines(file, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be unpacked ({error}): give JSON Lines packed by gzip.") from error


def _lines(file: Iterable[bytes], path: Path) -> Iterator[Row]:
    for number, data in enumerate(file, start=1):
        # Files with such marks, put behind one another, have them in the middle.
        line = _decode(data.removeprefix(BYTE_ORDER_MARK), path, number)
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            values = load_json(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: bad JSON ({error}): write one JSON object per line.") from error
        yield _row(values, where)


def _json(path: Path) -> Iterator[Row]:
    text = _text(path)
    if not text.strip():
        return iter(())
    if _is_json_lines(text):
        return _jsonl(path)
    try:
        values = load_json(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: bad JSON ({error}): write a list of objects.") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested too deeply; ...
        raise DataError(f"{path}:{_line_of_bad_row(text)}: bad JSON ({error}): correct this row.") from error
    if isinstance(values, dict) and isinstance(values.get("data"), list):
        values = values["data"]
    if not isinstance(values, list):
        raise DataError(f'{path}:1: this JSON is {_kind(values)}: write a list of objects, or {{"data": a list}}.')
    return (_row(value, f"{path}:row {number}") for number, value in enumerate(values, start=1))


def _is_json_lines(text: str) -> bool:
    """Whether the first line is an object by itself, and something follows it, as in many a `.json` of the hub."""
    first, _, rest = text.strip().partition("\n")
    if not (rest and first.startswith("{")):
        return False
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def load_json(text: str) -> Any:
    """`json.loads`, but a key that stands twice in an object is an error, and so is half a surrogate pair."""
    values = json.loads(text, object_pairs_hook=_object)
    if "\\ud" in text or "\\uD" in text:
        _check_characters(values)
    return values


def _check_characters(values: Any) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"\\u{ord(error.object[error.start]):x} is half a character") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return values


def _line_of_bad_row(text: str) -> int:
    """The line on which the first row begins that cannot be loaded: json does not say where it gave up."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    rows = ROWS_START.search(text)
    position = rows.end() if rows else 0
    while True:
        position += len(BETWEEN_ROWS.match(text, position)[0])  # type: ignore[index]
        try:
            row, end = decoder.raw_decode(text, position)
            _check_characters(row)
        except (ValueError, RecursionError):
            return text.count("\n", 0, position) + 1
        position = end


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise DataError(f"{where}: the row is {_kind(values)}: write a JSON object with one key per column.")
    return Row(values=values, where=where)


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _csv(path: Path) -> Iterator[Row]:
    """A quoted field may span lines, so a row's line is where it begins: one after the last one's end."""
    text = _text(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a field may be a whole book
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for fields in reader:
            if header is None and fields:
                header = _header(path, fields, line)
            elif header is not None and fields:
                yield _csv_row(header, fields, f"{path}:{line}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: bad CSV ({error}): check the quotes, or write JSON Lines.") from error


def _header(path: Path, fields: list[str], line: int) -> list[str]:
    repeated = sorted({name for name in fields if name and fields.count(name) > 1})
    if repeated or not any(fields):
        fault = f"column {repeated[0]!r} stands there twice" if repeated else "no column has a name"
        raise DataError(f"{path}:{line}: bad CSV header ({fault}): give each column a name of its own.")
    return fields


def _csv_row(header: list[str], fields: list[str], where: str) -> Row:
    if len(fields) != len(header):
        raise DataError(
            f"{where}: {len(fields)} fields under {len(header)} columns: quote fields that hold commas."
        )
    # A column without a name is the numbering that pandas writes, or what stands behind a last comma.
    cells = zip(header, map(_cell, fields), strict=True)
    return Row(values={name: cell for name, cell in cells if name}, where=where)


def _cell(text: str) -> Any:
    """A CSV field: the text, or the JSON object or list of objects (messages) that it is."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value = load_json(text)
    except (ValueError, RecursionError):
        return text  # a text that begins with a bracket
    objects = value if isinstance(value, list) else [value]
    return value if objects and all(isinstance(one, dict) for one in objects) else text


def _parquet(path: Path) -> Iterator[Row]:
    values = enumerate(parquet_values(path), start=1)
    return (Row(values=one, where=f"{path}:row {number}") for number, one in values)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".gz": _packed,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
