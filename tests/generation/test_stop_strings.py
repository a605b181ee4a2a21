"""Stop strings in text that grows by tokens: against searching the whole decoded text."""

import random

import pytest

from meshift.generation.stop_strings import StopStringMatcher

PIECES = ["a", "b", "ab", "", " ", "ba ", "é", "\u20ac"]


def decode_pieces(tokens):
    return "".join(PIECES[token] for token in tokens)


def decode_bytes(tokens):
    return bytes(tokens).decode("utf-8", errors="replace")


def decode_sentencepiece(tokens):
    """Like sentencepiece: every piece begins with a space, the first space of a text is dropped."""
    return decode_pieces(tokens).replace("a", " a").removeprefix(" ")


def first_stop(tokens, stop_strings, decode):
    """The number of tokens whose text first holds a stop string."""
    for end in range(1, len(tokens) + 1):
        if any(string in decode(tokens[:end]) for string in stop_strings):
            return end
    return None


def matched_at(tokens, stop_strings, decode):
    matcher = StopStringMatcher(stop_strings, decode)
    for end in range(1, len(tokens) + 1):
        if matcher.completed_by_last(tokens[:end]):
            return end
    return None


@pytest.mark.parametrize("decode", [decode_pieces, decode_sentencepiece])
@pytest.mark.parametrize("stop_strings", [("b ab",), ("bb", "b b"), ("é\u20ac", "ab a"), ("b a", "\u20acé")])
def test_the_stop_is_where_the_whole_text_first_holds_it(decode, stop_strings):
    chooser = random.Random(0)
    found = 0
    for _ in range(200):
        tokens = [chooser.randrange(len(PIECES)) for _ in range(40)]
        expected = first_stop(tokens, stop_strings, decode)
        assert matched_at(tokens, stop_strings, decode) == expected
        found += expected is not None
    assert found > 10


def test_characters_that_come_byte_by_byte_are_found_when_whole():
    tokens = list("x\u20acEND\u20acy".encode())
    assert matched_at(tokens, ("\u20acEND\u20ac",), decode_bytes) == 10
    assert matched_at(tokens, ("END",), decode_bytes) == 7


def test_a_stop_string_before_bytes_that_never_become_a_character_is_found():
    tokens = [0xE2, *b"ab", 0xE2, 0xE2, *b"STOP"]
    assert matched_at(tokens, ("STOP",), decode_bytes) == 9
    assert matched_at([*b"STO", 0xFF, *b"P"], ("STOP",), decode_bytes) is None


def test_only_a_bounded_tail_is_decoded():
    longest = []

    def decode(tokens):
        longest.append(len(tokens))
        return "".join(chr(97 + token) for token in tokens)

    assert matched_at([0] * 500, ("zz",), decode) is None
    assert max(longest) <= 3
