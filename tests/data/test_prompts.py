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
    (prompt,) = load({"prompt": "x", "answer": 3, "extra": {"a": [1]}}).prompts
    assert prompt.columns == {"answer": 3, "extra": {"a": [1]}}


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
        ({"promt": "x"}, r"prompts.jsonl:2: the column 'prompt' is missing; the row has \['promt'\]"),
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
