"""Text from tokens that come one by one is the text of all of them, and never shows half a character."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.generation.text_stream import TextStream


def decode_bytes(tokens):
    """Every token is a byte, as in byte-level tokenizers; what is no UTF-8 becomes the replacement character."""
    return bytes(tokens).decode("utf-8", errors="replace")


def pieces_of(tokens, decode=decode_bytes):
    stream, pieces = TextStream(decode), []
    for end in range(1, len(tokens) + 1):
        pieces.append(stream.grow(tokens[:end]))
    pieces.append(stream.close(tokens))
    assert stream.text == "".join(pieces)
    return pieces


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"])))
def test_the_pieces_would_not_add_up_to_the_text_or_show_half_a_character(text):
    pieces = pieces_of(list(text.encode()))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("num_missing", [1, 2, 3])
def test_a_character_that_was_cut_off_would_be_shown_as_a_replacement(num_missing):
    tokens = list("so 🌟".encode())[:-num_missing]
    assert "".join(pieces_of(tokens)) == "so "


def test_the_first_letters_of_a_text_would_wait_for_the_last():
    assert pieces_of(list(b"abc")) == ["a", "b", "c", ""]


def test_the_space_before_a_word_would_be_lost_where_it_depends_on_the_word_before():
    def decode(tokens):  # like sentencepiece: a leading space is dropped at the beginning of what is decoded
        return "".join(f" w{token}" for token in tokens)[1:]

    assert "".join(pieces_of([3, 1, 4, 1], decode)) == decode([3, 1, 4, 1])


def test_bytes_that_are_no_text_would_stop_the_stream():
    assert "".join(pieces_of([97, 0xFF, 98])) == "a\ufffdb"
