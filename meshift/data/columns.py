"""What a row's columns hold: texts, messages, truth values, numbers, each checked. It knows nothing of tokens."""

import math
import re
from typing import Any

from meshift.data.chat import Messages, check_messages
from meshift.data.rows import Row, did_you_mean, load_json
from meshift.errors import DataError

# A table with gaps has its truth values as 1.0 and 0.0.
TRUTHS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
# What str() makes of a list of messages: many CSV files hold that in place of JSON.
PYTHON_MESSAGES = ("[{'role'", "[{'content'")
JSON_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|content)"\s*:')


def has(row: Row, column: str) -> bool:
    """Whether the row has a value there; null is none, as tables write it where a column is another row's."""
    return row.values.get(column) is not None


def text_or_messages(row: Row, column: str) -> str | Messages:
    """A text that is not blank, or messages. Raises DataError."""
    if column not in row.values:
        raise missing(row, column)
    value: Any = row.values[column]
    if not isinstance(value, str):
        return check_messages(value, column, row.where)
    return _text(value, column, row.where)


def answer(row: Row, column: str) -> str | Messages:
    """A text or messages to learn from; the text or the last message may be blank. Raises DataError."""
    if column not in row.values:
        raise missing(row, column)
    value: Any = row.values[column]
    if not isinstance(value, str):
        return check_messages(value, column, row.where, may_end_blank=True)
    return _no_messages(value, column, row.where)


def text(row: Row, column: str) -> str:
    """A text, which may be blank. Raises DataError."""
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.where}: {column!r} must be a text, not {type(value).__name__}: write it as one.")
    return _no_messages(value, column, row.where)


def messages(row: Row, column: str) -> Messages:
    """A conversation, the last message of which may be blank. Raises DataError."""
    return check_messages(row.values[column], column, row.where, or_text=False, may_end_blank=True)


def truth(row: Row, column: str) -> bool:
    """True or false, also as the text that CSV has. Raises DataError."""
    value = row.values[column]
    found = TRUTHS.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if found is None:
        raise DataError(f"{row.where}: {column!r} is {shown(value)}: write true or false.")
    return found


def is_disliked(row: Row) -> bool:
    """Whether `label` says false, in any way that `truth` reads; another label (a class, a name) says nothing."""
    value = row.values.get("label")
    return isinstance(value, bool | int | float | str) and TRUTHS.get(str(value).strip().lower()) is False


def number(row: Row, column: str) -> float | None:
    """A finite number, also as the text that CSV has; None where there is none. Raises DataError."""
    value = row.values.get(column)
    if value is None or value == "":
        return None
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{row.where}: {column!r} is {shown(value)}: write a finite number.")
    return found


def tools(row: Row) -> list[Any] | None:
    """The functions that a conversation may call, as JSON schemas or their JSON text; None where there is none."""
    value = row.values.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = load_json(value)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{row.where}: 'tools' is bad JSON ({error}): write a list of JSON schemas."
            ) from error
    if value and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        raise DataError(f"{row.where}: 'tools' is {shown(value)}: write a list of JSON schemas.")
    return value or None


def missing(row: Row, column: str) -> DataError:
    """What to say of a column that is not there."""
    known = sorted(row.values)
    return DataError(
        f"{row.where}: the column {column!r} is missing; the row has {known}{did_you_mean(column, known)}"
    )


def _text(value: str, column: str, where: str) -> str:
    if not value.strip():
        raise DataError(f"{where}: {column!r} is blank: give it a text or remove the row.")
    return _no_messages(value, column, where)


def _no_messages(value: str, column: str, where: str) -> str:
    if value.startswith(PYTHON_MESSAGES):
        raise DataError(
            f"{where}: {column!r} is a list of messages in Python's notation: write it as JSON (json.dumps)."
        )
    if JSON_MESSAGES.match(value):
        raise DataError(
            f"{where}: {column!r} is a text that holds a list of messages: write the list itself, without quotes."
        )
    return value


def shown(value: Any) -> str:
    """A value for a sentence, cut where it is long."""
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
