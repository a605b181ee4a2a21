import logging

import pytest
from chat_templates import says, user
from hypothesis import given
from hypothesis import strategies as st

from meshift.data.preferences import load_preferences
from meshift.data.rows import Row
from meshift.data.unpaired import load_unpaired, matched
from meshift.errors import DataError


def judged(prompt, completion, label):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_a_judged_completion_would_lose_its_prompt_its_end_or_its_label(write_rows, tokenizer):
    path = write_rows(
        judged("Q:", " yes", True), judged([user("Q")], [says("no")], False), judged("Q", "x", "False")
    )
    data = load_unpaired(path, tokenizer, max_length=100).judged
    assert [one.label for one in data] == [True, False, False]
    assert [tokenizer.decode(one.tokens[one.num_prompt_tokens :]) for one in data] == [
        " yes<|im_end|>",
        "no<|im_end|>",
        "x<|im_end|>",
    ]
    assert tokenizer.decode(data[1].tokens[: data[1].num_prompt_tokens]).endswith("<|im_start|>assistant\n")
    assert [one.where[-1] for one in data] == ["1", "2", "3"]


def test_overlong_judged_completions_would_be_left_out_in_silence(write_rows, tokenizer, caplog):
    path = write_rows(judged("a", "b" * 9, True), judged("a", "b", True))
    with caplog.at_level(logging.INFO):
        data = load_unpaired(path, tokenizer, max_length=5)
    assert (len(data.judged), data.num_overlong, data.overlong[0][-1]) == (1, 1, "1")
    assert "1 of 2 rows left out" in caplog.text
    with pytest.raises(
        DataError, match=r"none of 2 rows can be used \(2 have more than max_length=1 tokens, 0 are blank"
    ):
        load_unpaired(path, tokenizer, max_length=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (judged("a", "b", 2.0), "'label' is 2.0: write true or false"),
        (judged("a", "b", "good"), "'label' is 'good': write true or false"),
        (judged("a", "b", 0.7), "'label' is 0.7: write true or false"),
        (judged("a", "b", [1]), r"'label' is \[1\]"),
        (judged("a", "b", None), "the column 'label' is missing"),
        (judged("", "b", True), "'prompt' is blank"),
    ],
)
def test_a_bad_judgement_would_be_reported_without_its_line(write_rows, tokenizer, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: {message}"):
        load_unpaired(write_rows(judged("a", "b", True), row), tokenizer, max_length=9)


def test_judged_completions_of_one_prompt_would_not_make_pairs(write_rows, tokenizer, caplog):
    rows = [
        judged("a", "good", True),
        judged("b", "bad", False),
        judged("a", "bad", False),
        judged("b", "good", True),
        judged("a", "fine", True),
        judged("c", "good", True),
    ]
    path = write_rows(*rows)
    with caplog.at_level(logging.INFO):
        data = load_preferences(path, tokenizer, max_length=50)
    texts = [tuple(tokenizer.decode(side) for side in (pair.chosen, pair.rejected)) for pair in data.pairs]
    assert texts == [("agood<|im_end|>", "abad<|im_end|>"), ("bgood<|im_end|>", "bbad<|im_end|>")]
    assert [pair.where for pair in data.pairs] == [f"{path}:1 with 3", f"{path}:4 with 2"]
    assert (data.num_unpaired, [where[-1] for where in data.unpaired]) == (2, ["5", "6"])
    assert "2 of 6 rows left out: unpaired completions without one of the other label" in caplog.text


def test_a_blank_completion_would_be_judged_or_use_up_a_counterpart(write_rows, tokenizer, caplog):
    path = write_rows(judged("a", " ", True), judged("a", "good", 1.0), judged("a", "bad", 0.0))
    with caplog.at_level(logging.INFO):
        pairs = load_preferences(path, tokenizer, max_length=50)
    assert [pair.where for pair in pairs.pairs] == [f"{path}:2 with 3"]
    assert (pairs.blank, pairs.unpaired) == ((f"{path}:1",), ())
    assert "1 of 3 rows left out: unpaired completions that are blank" in caplog.text
    with caplog.at_level(logging.INFO):
        one_by_one = load_unpaired(path, tokenizer, max_length=50)
    assert [one.label for one in one_by_one.judged] == [True, False]
    assert one_by_one.blank == (f"{path}:1",)
    assert "1 of 3 rows left out: completions that are blank" in caplog.text
    with pytest.raises(DataError, match=r"none of 1 rows can be used .*1 are blank"):
        load_unpaired(f"{path}[:1]", tokenizer, max_length=50)


def test_unpaired_data_without_pairs_would_give_no_way_out(write_rows, tokenizer):
    path = write_rows(judged("a", "x", True), judged("b", "y", False))
    with pytest.raises(DataError, match=r"rows\.jsonl is unpaired .*give chosen and rejected responses, or use a"):
        load_preferences(path, tokenizer, max_length=50)
    mixed = write_rows(judged("a", "x", True), {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(DataError, match=r"rows\.jsonl:2: this row is none of prompt, completion and label"):
        load_preferences(mixed, tokenizer, max_length=50)


@given(rows=st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=30))
def test_a_row_would_be_used_twice_or_paired_with_its_own_kind(rows):
    given_rows = [Row(values=judged(p, f"{i}", label), where=f"f:{i}") for i, (p, label) in enumerate(rows)]
    found = matched(given_rows)
    used = [int(row.values[side]) for row in found.rows for side in ("chosen", "rejected")]
    assert len(set(used)) == len(used)
    assert sorted(used + [int(where[2:]) for where in found.unpaired]) == list(range(len(rows)))
    for row in found.rows:
        chosen, rejected = rows[int(row.values["chosen"])], rows[int(row.values["rejected"])]
        assert chosen == (row.values["prompt"], True)
        assert rejected == (row.values["prompt"], False)
    expected = sum(min(rows.count((p, True)), rows.count((p, False))) for p in "abc")
    assert len(found.rows) == expected
