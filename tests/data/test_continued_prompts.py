"""Prompts that end with the assistant's own words, which the response goes on with within the same message."""

import pytest
from chat_templates import ALL, plain, says, user

from meshift.data.demonstrations import load_demonstrations
from meshift.data.preferences import load_preferences
from meshift.data.prompts import load_prompts
from meshift.errors import DataError

BEGUN = [user("Well?"), says("The film")]


@pytest.fixture
def sides(write_rows, tokenizer):
    """(prompt of generation, prompt of training, response) of a row with `prompt` and `completion`, as texts."""
    tokenizer.bos_token = "<|head|>"

    def sides(row, **options):
        path = write_rows(row)
        (asked,) = load_prompts(path, tokenizer, max_prompt_length=500, **options).prompts
        options["stop_token_ids"] = (tokenizer.convert_tokens_to_ids("<|eot|>"),)
        (one,) = load_demonstrations(
            path, tokenizer, max_length=500, loss_on="completion", **options
        ).demonstrations
        pairs = write_rows(
            {**row, "chosen": row["completion"], "rejected": "x"}
            if isinstance(row["completion"], str)
            else {**row, "chosen": row["completion"], "rejected": [says("x")]},
            name="p.jsonl",
        )
        (pair,) = load_preferences(pairs, tokenizer, max_length=500, **options).pairs
        start = one.loss_mask.index(True)
        assert pair.chosen == one.tokens
        assert pair.num_prompt_tokens == start
        assert asked.text == tokenizer.decode(asked.tokens)
        return asked.text, tokenizer.decode(one.tokens[:start]), tokenizer.decode(one.tokens[start:])

    return sides


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("begun", ["The film", "The film ", "<think>\nA film,"])
@pytest.mark.parametrize("written", [str, lambda text: [says(text)]])
def test_a_begun_answer_would_get_a_second_header(sides, tokenizer, family, begun, written):
    tokenizer.chat_template = plain(ALL[family])
    asked = [user("Well?"), says(begun)]
    generated, trained, response = sides({"prompt": asked, "completion": written(" was good")})
    assert generated == tokenizer.apply_chat_template(asked, continue_final_message=True, tokenize=False)
    assert trained == generated
    whole = tokenizer.apply_chat_template([user("Well?"), says(f"{begun} was good")], tokenize=False)
    assert trained + response == whole.rstrip()


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("\n\nHuman: Well?\n\nAssistant: The film", " was good ", "The film| was good"),
        ("Human: Well?\n\nAssistant: The film ", "was good", "The film |was good"),
        ("\n\nHuman: Well?\n\nAssistant: So.\n\nAssistant:", " The film", "So.\n\n|The film"),
    ],
)
def test_a_begun_answer_of_a_dialogue_would_get_a_second_header(sides, prompt, completion, expected):
    generated, trained, response = sides({"prompt": prompt, "completion": completion}, apply_chat_template=True)
    opening = "<|im_start|>user\nWell?<|im_end|>\n<|im_start|>assistant\n"
    assert generated == trained
    assert f"{trained}|{response}" == f"{opening}{expected}<|im_end|>"


def test_complete_messages_would_be_joined_with_those_behind_them(write_rows, tokenizer):
    talk = [*BEGUN, says("was good")]
    expected = tokenizer.apply_chat_template(talk, tokenize=False).rstrip()
    path = write_rows({"messages": talk, "prompt": talk[:2]})
    (one,) = load_demonstrations(path, tokenizer, max_length=500, loss_on="completion").demonstrations
    assert tokenizer.decode(one.tokens) == expected
    for row in ({}, {"prompt": "Well?"}):
        path = write_rows({**row, "chosen": talk, "rejected": [*BEGUN, says("was bad")]})
        (pair,) = load_preferences(path, tokenizer, max_length=500).pairs
        assert tokenizer.decode(pair.chosen) == expected
    (asked,) = load_prompts(
        write_rows({"chosen": talk, "rejected": [*BEGUN, says("no")]}), tokenizer, max_prompt_length=500
    ).prompts
    assert expected.startswith(asked.text)


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            {"prompt": BEGUN, "completion": "a"},
            "the chat template does not write them as they are, .*: end 'prompt' with the user's",
        ),
        (
            plain(ALL["chatml"]),
            {"prompt": [user("a"), {"role": "assistant", "tool_calls": [{"name": "add"}]}], "completion": "a"},
            "'prompt' ends with a call of a tool",
        ),
        (
            plain(ALL["chatml"]),
            {"prompt": BEGUN, "completion": [user("a"), says("b")]},
            "what follows is of the role 'user': go on with the assistant's",
        ),
    ],
)
def test_words_that_cannot_be_gone_on_with_would_give_a_traceback(write_rows, tokenizer, template, row, message):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        load_demonstrations(write_rows(row), tokenizer, max_length=500, loss_on="completion")
