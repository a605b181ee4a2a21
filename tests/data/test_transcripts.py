import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.data.transcripts import answer_start, answers, is_transcript, transcript_messages

TALK = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tell me\n\nAssistant: I won't\n\nreally"


@pytest.mark.parametrize("text", [TALK, TALK.strip(), " " + TALK, TALK.replace("\n", "\r\n")])
def test_turns_would_be_cut_at_blank_lines_or_lost(text):
    assert [(m["role"], m["content"].replace("\r", "")) for m in transcript_messages(text)] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Tell me"),
        ("assistant", "I won't\n\nreally"),
    ]
    assert text[answer_start(text) :].replace("\r", "") == " I won't\n\nreally"


def test_an_open_turn_would_become_a_blank_message():
    assert [m["role"] for m in transcript_messages(TALK[: answer_start(TALK)])] == ["user", "assistant", "user"]


def test_two_turns_of_one_speaker_would_be_refused_by_templates_that_want_them_to_alternate():
    talk = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nAssistant:"
    assert [(m["role"], m["content"]) for m in transcript_messages(talk)] == [
        ("user", "a\n\nb"),
        ("assistant", "c\n\n"),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TALK, True),
        (TALK.strip(), True),
        (TALK.replace("\n", "\r\n"), True),
        ("Human: Hi\n\nAssistant:", True),
        ("\n\nHuman: Hi", False),
        ("Human: a race\n\nThe Assistant: b", False),
        ("a\n\nAssistant: b", False),
        ("a\n\nHuman: b\n\nAssistant: c", False),
        ("Assistant: a\n\nHuman: b\n\nAssistant: c", False),
    ],
)
def test_another_text_would_be_taken_for_a_dialogue(text, expected):
    assert is_transcript(text) is expected


@given(turns=st.lists(st.tuples(st.sampled_from(["Human", "Assistant"]), st.text(max_size=5)), min_size=1))
def test_what_the_assistant_says_would_not_be_what_stands_behind_its_markers(turns):
    text = "".join(f"\n\n{speaker}:{said}" for speaker, said in turns)
    pieces = re.split(r"\n\n(Human|Assistant):", text)[1:]
    expected = [said for speaker, said in zip(pieces[::2], pieces[1::2], strict=True) if speaker == "Assistant"]
    assert [text[start:end] for start, end in answers(text)] == expected
