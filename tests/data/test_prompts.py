import json
import logging

import pytest

from meshift.data.prompts import load_prompts
from meshift.errors import DataError


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(*rows, **options):
        path = tmp_path / "prompts.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return load_prompts(str(path), tokenizer, **{"max_prompt_length": 100, **options})

    return load


def test_a_text_prompt_would_be_changed_on_its_way_to_tokens(load, tokenizer):
    (prompt,) = load({"prompt": "This film"}).prompts
    assert prompt.text == "This film"
    assert tokenizer.decode(prompt.tokens) == "This film"


def test_a_prompt_would_not_know_its_row(load):
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "Hi"}]}]
    assert [prompt.where[-15:] for prompt in load(*rows).prompts] == ["prompts.jsonl:1", "prompts.jsonl:2"]


def test_messages_would_not_open_the_assistants_turn(load, tokenizer):
    (prompt,) = load({"prompt": [{"role": "user", "content": "Hi"}]}).prompts
    assert prompt.text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(prompt.tokens) == prompt.text
    assert prompt.tokens.count(tokenizer.eos_token_id) == 1


def test_columns_would_not_reach_the_reward_function(load):
    (prompt,) = load({"prompt": "x", "score": 3, "extra": {"a": [1]}}).prompts
    assert prompt.columns == {"score": 3, "extra": {"a": [1]}}


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "1 + 1?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 0},
}


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        (VERL, "2"),
        ({"prompt": "x", "answer": 3}, 3),
        ({"prompt": "x", "ground_truth": [3]}, [3]),
        ({"prompt": "x", "label": False}, False),
        ({"prompt": "x", "label": 3, "answer": 3}, 3),
        ({"prompt": "x", "label": None, "answer": "", "ground_truth": 3}, 3),
    ],
)
def test_a_function_would_miss_the_right_answer_under_the_name_it_knows(load, row, answer):
    (prompt,) = load(row).prompts
    assert {name: prompt.columns[name] for name in ("ground_truth", "answer", "label")} == {
        "ground_truth": answer,
        "answer": answer,
        "label": answer,
    }
    assert {key: prompt.columns[key] for key in row if key in ("data_source", "reward_model", "extra_info")} == {
        key: row[key] for key in row if key in ("data_source", "reward_model", "extra_info")
    }


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": 2, "ground_truth": 3}, "'ground_truth' is 3 and 'label' is 2"),
        ({"answer": "1", "label": "2", "ground_truth": "3"}, "'ground_truth' is '3' and 'answer' is '1'"),
        (VERL | {"answer": "3"}, "'reward_model.ground_truth' is '2' and 'answer' is '3'"),
        ({"label": False, "answer": "no"}, "'answer' is 'no' and 'label' is False"),
    ],
)
def test_of_two_right_answers_any_could_be_taken(load, columns, message):
    with pytest.raises(DataError, match=rf"prompts\.jsonl:2: {message}, .*: rename or remove one"):
        load({"prompt": "a"}, {"prompt": "x", **columns})


def test_one_answer_written_in_two_ways_would_be_refused_or_changed(load):
    (prompt,) = load(VERL | {"answer": 2}).prompts
    assert {name: prompt.columns[name] for name in ("ground_truth", "answer", "label")} == {
        "ground_truth": "2",
        "answer": 2,
        "label": "2",
    }


def test_preference_rows_would_give_no_prompts(load):
    shared = "\n\nHuman: Hi\n\nAssistant:"
    (prompt,) = load({"chosen": f"{shared} Hello", "rejected": f"{shared} No"}).prompts
    assert prompt.text == shared
    asked = [{"role": "user", "content": "Hi"}]
    sides = {side: [*asked, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    assert load(sides).prompts[0].messages == asked
    with pytest.raises(DataError, match="the column 'prompt' is missing"):
        load({"chosen": "a", "rejected": "b"})


def test_texts_would_not_become_messages_on_demand(load):
    data = load(
        {"prompt": "Hi"},
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"},
        apply_chat_template=True,
    )
    assert [[(m["role"], m["content"]) for m in prompt.messages] for prompt in data.prompts] == [
        [("user", "Hi")],
        [("user", "a"), ("assistant", "b"), ("user", "c")],
    ]
    assert data.prompts[0].text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_tools_would_not_reach_the_template(load, tokenizer):
    tokenizer.chat_template = "{{ tools | map(attribute='name') | join('+') }}:{{ messages[0]['content'] }}"
    asked = [{"role": "user", "content": "Hi"}]
    tools = [{"name": "add"}, {"name": "sub"}]
    for given in (tools, json.dumps(tools)):
        assert load({"prompt": asked, "tools": given}).prompts[0].text == "add+sub:Hi"
    for wrong in ("{", [1], 3):
        with pytest.raises(DataError, match=r"prompts\.jsonl:1: 'tools' is"):
            load({"prompt": asked, "tools": wrong})


def test_an_end_that_the_tokenizer_puts_would_stand_within_the_sequence(load, tokenizer):
    from tokenizers.processors import TemplateProcessing

    stop, start = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", start), ("<|im_end|>", stop)]
    )
    (prompt,) = load({"prompt": "Hi"}).prompts
    assert tokenizer.decode(prompt.tokens) == "<|im_start|>Hi"


def test_overlong_prompts_would_be_cut_or_dropped_in_silence(load, caplog):
    with caplog.at_level(logging.INFO):
        data = load({"prompt": "12345"}, {"prompt": "123456"}, {"prompt": "1"}, max_prompt_length=5)
    assert [prompt.text for prompt in data.prompts] == ["12345", "1"]
    assert data.num_overlong == 1
    assert data.overlong[0].endswith("prompts.jsonl:2")
    assert "1 of 3 rows left out" in caplog.text
    assert "prompts.jsonl:2" in caplog.text
    with pytest.raises(DataError, match=r"none of 1 prompts.*raise max_prompt_length"):
        load({"prompt": "123456"}, max_prompt_length=5)


def test_limit_would_count_prompts_that_are_left_out(load):
    data = load(
        {"prompt": "too long"}, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}, max_prompt_length=2, limit=2
    )
    assert [prompt.text for prompt in data.prompts] == ["a", "b"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"promt": "x"},
            r"prompts.jsonl:2: the column 'prompt' is missing; the row has \['promt'\]; did you mean 'promt'",
        ),
        ({"prompt": 3}, "prompts.jsonl:2: 'prompt' must be a text or a non-empty list of messages, not int"),
        ({"prompt": [{"role": "system", "content": "x"}]}, "prompts.jsonl:2: 'prompt' has system messages only"),
        (
            {"prompt": "[{'role': 'user', 'content': 'x'}]"},
            "prompts.jsonl:2: .*Python's notation: write it as JSON",
        ),
        ({"prompt": " \n"}, "prompts.jsonl:2: 'prompt' is blank"),
        ({"prompt": None}, "prompts.jsonl:2: 'prompt' must be a text or a non-empty list"),
        ({"prompt": []}, "prompts.jsonl:2: 'prompt' must be a text or a non-empty list"),
        ({"prompt": [{"role": "user"}]}, "prompts.jsonl:2: message 1 of 'prompt' must be"),
    ],
)
def test_a_bad_prompt_would_be_reported_without_its_line(load, row, message):
    with pytest.raises(DataError, match=message):
        load({"prompt": "good"}, row)


def test_a_tokenizer_without_or_with_a_strict_template_would_give_a_traceback(load, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"prompts.jsonl:1: .*roles must alternate"):
        load({"prompt": [{"role": "user", "content": "Hi"}]})
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"prompts.jsonl:1: .*no chat template"):
        load({"prompt": [{"role": "user", "content": "Hi"}]})
