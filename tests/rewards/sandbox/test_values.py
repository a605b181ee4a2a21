"""Values as plain data: there and back they are the same, and nothing else can be read."""

import json
import math
import os
import threading
from collections import deque
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshift.rewards.sandbox.comparing import same_output, same_value
from meshift.rewards.sandbox.values import MAX_BYTES, MAX_DEPTH, ValueNotPlainError, decode, encode, receive, send

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(),
    st.complex_numbers(allow_nan=False), st.fractions(), st.decimals(allow_nan=False),
)  # fmt: skip
HASHABLE = st.recursive(
    SCALARS, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5
)
VALUES = st.recursive(
    HASHABLE,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(HASHABLE, inner, max_size=3)
        | st.sets(HASHABLE, max_size=3)
        | st.lists(inner, max_size=3).map(deque)
        | st.tuples(inner)
    ),
    max_leaves=12,
)


def refuse(value):
    raise AssertionError(f"{value!r} has a plain form")


def through(value):
    return decode(json.loads(json.dumps(encode(value, refuse))), refuse)


def typed(value):
    """A value with the types of all its parts, so that 1, 1.0 and True differ."""
    if isinstance(value, dict):
        return dict, sorted(repr((typed(k), typed(v))) for k, v in value.items())
    if isinstance(value, set | frozenset):
        return type(value), sorted(repr(typed(item)) for item in value)
    if isinstance(value, list | tuple | deque):
        return type(value), tuple(map(typed, value))
    return type(value), repr(value)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_there_and_back_is_the_same(value):
    assert typed(through(value)) == typed(value)


def test_nan_and_subclasses():
    assert math.isnan(through(math.nan))

    class Odd(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    class Text(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    for value in (Odd(3), Text("a"), [Odd(3)], {Text("a"): Odd(1)}):
        assert typed(through(value)) == typed(json.loads(json.dumps(value)))
    assert through(Fraction(1, 3)) == Fraction(1, 3)
    assert through(Decimal("1.10")) == Decimal("1.10")
    assert through(bytearray(b"a")) == bytearray(b"a")


@pytest.mark.parametrize(
    "data",
    [
        {"i": 3}, {"i": "zz"}, {"f": "x"}, {"f": None}, {"b": "*"}, {"c": ["1"]}, {"r": ["0x1", "0x0"]}, {"t": 3},
        {"s": [[1]]}, {"d": [[1]]}, {"d": [[[1], 2]]}, {"o": 1}, {}, {"t": [], "s": []}, {"m": "x"}, {"m": {}},
        {"d": {"a": 1}}, {"d": 1},
    ],
)  # fmt: skip
def test_what_nobody_can_have_written_is_refused(data):
    def unknown(data):
        raise ValueNotPlainError("unreadable data (unknown tag)")

    with pytest.raises(ValueNotPlainError):
        decode(data, unknown)


def test_depth_is_bounded_both_ways():
    value = []
    for _ in range(MAX_DEPTH + 5):
        value = [value]
    with pytest.raises(ValueNotPlainError, match="nested"):
        encode(value, refuse)
    with pytest.raises(ValueNotPlainError, match="nested"):
        decode(value, refuse)


def test_messages_pass_whole_and_false_ones_are_refused():
    reads, writes = os.pipe()
    long = "x" * 300_000
    sender = threading.Thread(target=send, args=(writes, [long, 1]))
    sender.start()
    assert receive(reads) == [long, 1]
    sender.join()
    for raw in (b"\xff\xff\xff\xff", b"\0\0\0\3{]}"):
        os.write(writes, raw)
        with pytest.raises(ValueNotPlainError):
            receive(reads)
    with pytest.raises(ValueNotPlainError, match="longer"):
        send(writes, "x" * MAX_BYTES)
    os.write(writes, b"\0\0\0\x09ab")
    os.close(writes)
    assert receive(reads) is None
    os.close(reads)


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("1 2\n3\n", "1 2 3", True), ("1\n", "1", True), ("", "", True), ("12", "1 2", False),
        ("1", "1 1", False),
        ("0.3333333", "0.33333333", True), ("0.3334", "0.33333333", False),
        ("1e-7", "0.0", True),
        ("2", "2.0", True),
        ("2.0", "2", False), ("nan", "0.5", False), ("nan", "nan", True),
        ("inf", "1e9", False), ("x", "0.5", False),
        ("1000000.4", "1000000.5", True), ("YES", "Yes", False), ("1" * 50, "1" * 49 + "2", False),
    ],
)  # fmt: skip
def test_outputs_are_compared_word_by_word(actual, expected, same):
    assert same_output(actual, expected) is same


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        ("YES\nno", "Yes NO", True), ("YES", "NO", False), ("2.0", "2", True), ("2", "2.0", True),
        ("0.33334", "0.33333", False), ("0.333333", "0.333334", True), ("1000000.4", "1000000.5", False),
        ("123456789.000001", "123456789.000002", True), ("2.1", "2", False), ("1E3", "1000", True),
        ("9007199254740993", "9007199254740992", False), ("1" * 50, "1" * 49 + "2", False),
        ("nan", "0.5", False), ("nan", "NaN", True), ("inf", "0.5", False), ("x.y", "X.y", True),
        ("yes.", "0.5", False),
    ],
)  # fmt: skip
def test_outputs_of_contests_are_compared_as_their_own_tester_does(actual, expected, same):
    assert same_output(actual, expected, contest=True) is same


@pytest.mark.parametrize(
    ("actual", "expected", "same"),
    [
        (3, 3, True), (3, [3], True), ([3], [3], True), ((1, (2,)), [1, [2]], True), ((1, 2), [[1, 2]], True),
        ([1], [1, 2], False), ([], [[]], True), (0.1 + 0.2, 0.3, True), ([0.1 + 0.2], [[0.3]], True),
        ("a", ["b"], False),
        (None, [], False), ({1: (2,)}, {1: [2]}, True), (True, 1, True), ([3], [[[3]]], False),
    ],
)  # fmt: skip
def test_values_are_compared_as_apps_means_them(actual, expected, same):
    assert same_value(actual, expected) is same
