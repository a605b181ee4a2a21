"""Whatever stands in a file, reading it gives rows or a sentence, never a traceback."""

import json
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshift.data.demonstrations import load_demonstrations
from meshift.data.preferences import load_preferences
from meshift.data.prompts import load_prompts
from meshift.data.rows import read_rows
from meshift.data.unpaired import load_unpaired
from meshift.errors import DataError

ASSISTANT = partial(load_demonstrations, max_length=50, loss_on="assistant")
LOADERS = (
    ASSISTANT,
    partial(load_demonstrations, max_length=9, loss_on="completion", truncate=True, apply_chat_template=True),
    partial(load_preferences, max_length=50),
    partial(load_preferences, max_length=50, apply_chat_template=True),
    partial(load_unpaired, max_length=50),
    partial(load_prompts, max_prompt_length=50),
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant:", "<|im_end|>"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXTS | JSON}), max_size=4)
COLUMNS = ["prompt", "completion", "label", "messages", "text", "chosen", "rejected", "margin", "weight", "answer"]
ROWS = st.dictionaries(st.sampled_from([*COLUMNS, "tools", "reward_model"]), TEXTS | MESSAGES | JSON, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("any")


def sentence(read, *arguments):
    """What is said of bad input; None if it is good."""
    try:
        assert read(*arguments)
    except DataError as error:
        return str(error)
    return None


def read_all(path, tokenizer):
    for load in LOADERS:
        said = sentence(load, str(path), tokenizer)
        assert said is None or (len(said.splitlines()) == 1 and path.name in said), said


@given(data=st.binary(max_size=60), suffix=st.sampled_from([".jsonl", ".json", ".csv"]))
@settings(max_examples=150)
def test_any_bytes_would_give_a_traceback(folder, data, suffix):
    path = folder / f"bytes{suffix}"
    path.write_bytes(data)
    said = sentence(read_rows, path)
    assert said is None or path.name in said


@given(
    rows=st.lists(ROWS, min_size=1, max_size=3), as_ascii=st.booleans(), newline=st.sampled_from(["\n", "\r\n"])
)
@settings(max_examples=150)
def test_any_rows_would_give_a_traceback(folder, shared_tokenizer, rows, as_ascii, newline):
    path = folder / "rows.jsonl"
    text = newline.join(json.dumps(row, ensure_ascii=as_ascii) for row in rows)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    read_all(path, shared_tokenizer)


@given(row=ROWS, place=st.integers(0, 200), byte=st.integers(0, 255))
@settings(max_examples=60)
def test_a_row_with_one_wrong_byte_would_give_a_traceback(folder, shared_tokenizer, row, place, byte):
    data = bytearray(json.dumps([row, row], ensure_ascii=False).encode("utf-8", "surrogatepass"))
    data[place % len(data)] = byte
    path = folder / "torn.json"
    path.write_bytes(data)
    read_all(path, shared_tokenizer)


def test_columns_nested_too_deeply_would_give_a_traceback(folder, shared_tokenizer):
    for depth in (100, 500, 900, 990, 100_000):
        path = folder / "deep.jsonl"
        deep = "[" * depth + "]" * depth
        path.write_text(f'{{"prompt": {deep}, "chosen": "\\ud83d\\ude00", "rejected": {deep}, "label": {deep}}}')
        read_all(path, shared_tokenizer)
