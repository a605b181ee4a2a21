"""Values as plain data: how arguments and results pass between the process that tests and the one that is tested.

Numbers, texts and collections become JSON with tags; anything else stays where it is and passes as a reference.
What is read makes nothing but values of Python's own types, whoever wrote it. It knows nothing of processes.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_BYTES = 8 * 2**20  # of one message
MAX_DEPTH = 200
LARGEST_PLAIN = 2**63  # integers beyond are written in hexadecimal: Python limits how many decimals it reads

Refer = Callable[[Any], dict[str, Any]]
Resolve = Callable[[dict[str, Any]], Any]


class ValueNotPlainError(Exception):
    """A value that cannot pass, or a message that is none of ours."""


def encode(value: Any, refer: Refer, depth: int = 0) -> Any:
    """JSON data for a value; `refer` gives the data of what has no plain form. Subclasses pass as their
    parents."""
    if depth > MAX_DEPTH:
        raise ValueNotPlainError(f"a value is nested more than {MAX_DEPTH} deep")
    if value is None or value is True or value is False:
        return value
    plain = _encode_scalar(value)
    if plain is not None:
        return plain
    if isinstance(value, list):
        return [encode(item, refer, depth + 1) for item in value]
    for kind, tag in COLLECTIONS:
        if isinstance(value, kind):
            return {tag: [encode(item, refer, depth + 1) for item in value]}
    if isinstance(value, dict):
        pairs = value.items()
        return {"d": [[encode(k, refer, depth + 1), encode(v, refer, depth + 1)] for k, v in pairs]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return encode(value.item(), refer, depth)  # a number of numpy's
    return refer(value)


COLLECTIONS: tuple[tuple[Any, str], ...] = ((tuple, "t"), (set, "s"), (frozenset, "z"), (deque, "q"))


def _encode_scalar(value: Any) -> Any:
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int(value)
        return number if -LARGEST_PLAIN < number < LARGEST_PLAIN else {"i": hex(number)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"f": repr(float(value))}
    if isinstance(value, complex):
        return {"c": [repr(value.real), repr(value.imag)]}
    if isinstance(value, bytes | bytearray):
        return {"y" if isinstance(value, bytearray) else "b": base64.b64encode(bytes(value)).decode()}
    if isinstance(value, Decimal):
        return {"m": str(value)}
    if isinstance(value, Fraction):
        return {"r": [hex(value.numerator), hex(value.denominator)]}
    return None


def decode(data: Any, resolve: Resolve) -> Any:
    """The value. Raises `ValueNotPlainError` for data that `encode` cannot have made."""
    try:
        return _decode(data, resolve, 0)
    except (TypeError, ValueError, ArithmeticError, KeyError, IndexError, RecursionError, AttributeError) as error:
        raise ValueNotPlainError(f"unreadable data ({type(error).__name__})") from None


def _decode(data: Any, resolve: Resolve, depth: int) -> Any:
    if depth > MAX_DEPTH + 1:
        raise ValueNotPlainError(f"a value is nested more than {MAX_DEPTH} deep")
    if isinstance(data, list):
        return [_decode(item, resolve, depth + 1) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) != 1:
        raise ValueNotPlainError("unreadable data (a tag too many)")
    ((tag, content),) = data.items()
    if tag == "d":
        return {_decode(k, resolve, depth + 1): _decode(v, resolve, depth + 1) for k, v in content}
    for kind, own in COLLECTIONS:
        if tag == own:
            return kind(_decode(item, resolve, depth + 1) for item in content)
    return _decode_scalar(tag, content, resolve)


def _decode_scalar(tag: str, content: Any, resolve: Resolve) -> Any:
    match tag:
        case "i":
            return int(content, 16)
        case "f":
            return float(content)
        case "c":
            return complex(float(content[0]), float(content[1]))
        case "b":
            return base64.b64decode(content, validate=True)
        case "y":
            return bytearray(base64.b64decode(content, validate=True))
        case "m":
            return Decimal(content)
        case "r":
            return Fraction(int(content[0], 16), int(content[1], 16))
    return resolve({tag: content})


def send(place: int, message: Any) -> None:
    """Write one message. Raises `ValueNotPlainError` where it is too long, `OSError` where nobody reads."""
    body = json.dumps(message).encode()
    if len(body) > MAX_BYTES:
        raise ValueNotPlainError(f"a message of {len(body)} bytes is longer than {MAX_BYTES}")
    rest = memoryview(len(body).to_bytes(4, "big") + body)
    while rest:
        rest = rest[os.write(place, rest) :]


def receive(place: int) -> Any:
    """Read one message, None at the end. Raises `ValueNotPlainError` for what is none."""
    head = _read(place, 4)
    if len(head) < 4:
        return None
    length = int.from_bytes(head, "big")
    if length > MAX_BYTES:
        raise ValueNotPlainError(f"a message of {length} bytes is longer than {MAX_BYTES}")
    body = _read(place, length)
    if len(body) < length:
        return None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise ValueNotPlainError("a message that is not JSON") from None


def _read(place: int, length: int) -> bytes:
    parts = []
    while length and (part := os.read(place, min(length, 1 << 20))):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
