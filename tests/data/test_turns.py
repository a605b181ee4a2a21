import pytest
from byte_tokenizer import byte_tokenizer
from chat_templates import ALL, CHATML, marked, plain, says, user

from meshift.data.chat import Conversation
from meshift.data.turns import assistant_turns
from meshift.errors import DataError

TALK = [user("One?"), says("Yes"), user("Two? "), says(" No\n"), user("Then?"), says("yes, o yes")]


@pytest.fixture
def spoken(tokenizer):
    """`spoken(template, messages)`: what of the rendered conversation is found to be the assistant's, as texts."""
    tokenizer.bos_token = "<|head|>"

    def spoken(template, messages):
        tokenizer.chat_template = template
        said = Conversation(messages=messages, where="a.jsonl:7")
        whole = said.render(tokenizer, add_generation_prompt=False)
        return whole, [whole[start:end] for start, end in assistant_turns(tokenizer, said, whole)]

    return spoken


@pytest.mark.parametrize("family", ALL)
def test_turns_found_would_differ_from_those_the_template_marks_itself(spoken, family):
    whole, found = spoken(plain(ALL[family]), TALK)
    same, told = spoken(marked(ALL[family]), TALK)
    assert whole == same
    assert found == told
    assert len(found) == 3


@pytest.mark.parametrize("family", ["chatml", "headers", "thinking"])
def test_a_system_message_or_two_answers_in_a_row_would_shift_the_turns(spoken, family):
    talk = [{"role": "system", "content": "Be brief"}, user("a"), says("b"), says("c"), user("d"), says("e")]
    assert spoken(plain(ALL[family]), talk)[1] == spoken(marked(ALL[family]), talk)[1]


def test_an_answer_that_opens_the_conversation_would_be_lost(spoken):
    assert spoken(plain(CHATML), [says("Welcome"), user("Hi"), says("Yes?")])[1] == [
        "Welcome<|im_end|>",
        "Yes?<|im_end|>",
    ]


def test_thoughts_that_the_template_takes_out_would_be_looked_for(spoken):
    talk = [user("a"), says("<think>\nhm\n</think>\n\nb"), user("c"), says("<think>\nso\n</think>\n\nd")]
    whole, found = spoken(plain(ALL["thinking"]), talk)
    assert "hm" not in whole
    assert found == ["b<|im_end|>", "<think>\nso\n</think>\n\nd<|im_end|>"]


def test_a_turn_that_cannot_be_told_from_the_rest_would_be_guessed(spoken):
    upside_down = "{% for m in messages | reverse %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(DataError, match=r"a\.jsonl:7: the chat template writes message 2 otherwise"):
        spoken(upside_down, TALK)


def test_a_template_with_marks_that_refuses_would_give_a_traceback():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% generation %}{% endgeneration %}{{ raise_exception('not so') }}"
    said = Conversation(messages=TALK, where="a.jsonl:7")
    with pytest.raises(DataError, match=r"a\.jsonl:7: .*not so"):
        assistant_turns(tokenizer, said, "")
