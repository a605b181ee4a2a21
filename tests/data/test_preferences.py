import json
import logging
from pathlib import Path

import pytest

from meshift.data.preferences import load_preferences
from meshift.errors import DataError

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_harmless_dev.jsonl"
ASK = {"role": "user", "content": "Hi"}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tmp_path, tokenizer):
    def load(*rows, **options):
        path = tmp_path / "pairs.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return load_preferences(str(path), tokenizer, **{"max_length": 500, **options})

    return load


@pytest.fixture
def parts(load, tokenizer):
    """(prompt, chosen response, rejected response) as text of the only pair of `row`."""

    def parts(row, **options):
        (pair,) = load(row, **options).pairs
        num_prompt = pair.num_prompt_tokens
        assert pair.chosen[:num_prompt] == pair.rejected[:num_prompt]
        pieces = (pair.chosen[:num_prompt], pair.chosen[num_prompt:], pair.rejected[num_prompt:])
        return tuple(tokenizer.decode(piece) for piece in pieces)

    return parts


def test_explicit_texts_would_not_be_prompt_response_eos(parts):
    row = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
    assert parts(row) == ("Q:", " yes<|im_end|>", " no<|im_end|>")
    assert parts(row, append_eos=False) == ("Q:", " yes", " no")


def test_texts_without_a_prompt_would_lose_their_common_beginning(parts):
    row = {"chosen": "A fine film", "rejected": "A poor film"}
    assert parts(row, append_eos=False) == ("", "A fine film", "A poor film")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [says("yes")], "rejected": [says("no")]},
        {"prompt": [ASK], "chosen": "yes", "rejected": "no"},
        {"prompt": "Hi", "chosen": [says("yes")], "rejected": [says("no")]},
        {"prompt": "Hi", "chosen": [ASK, says("yes")], "rejected": [ASK, says("no")]},
        {"chosen": [ASK, says("yes")], "rejected": [ASK, says("no")]},
    ],
)
def test_the_ways_to_write_one_conversation_would_differ_in_tokens(parts, row):
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert parts(row) == (prompt, "yes<|im_end|>", "no<|im_end|>")


def test_a_longer_shared_prefix_would_be_taken_for_the_response(parts):
    shared = [ASK, says("Hello"), {"role": "user", "content": "More"}]
    prompt, chosen, rejected = parts({"chosen": [*shared, says("yes")], "rejected": [*shared, says("no")]})
    assert prompt.endswith("More<|im_end|>\n<|im_start|>assistant\n")
    assert (chosen, rejected) == ("yes<|im_end|>", "no<|im_end|>")


def test_a_prompt_that_both_sides_repeat_would_be_read_twice(parts):
    shared = "\n\nHuman: Hi\n\nAssistant:"
    row = {"prompt": shared, "chosen": f"{shared} yes", "rejected": f"{shared} no"}
    assert parts(row) == (shared, " yes<|im_end|>", " no<|im_end|>")
    row = {"prompt": [ASK], "chosen": [ASK, says("yes")], "rejected": [ASK, says("no")]}
    assert parts(row)[1:] == ("yes<|im_end|>", "no<|im_end|>")
    row = {"prompt": "the film was", "chosen": "the film was good", "rejected": "the film was bad"}
    assert parts(row) == ("the film was", " good<|im_end|>", " bad<|im_end|>")
    row["rejected"] = "the film is"
    assert parts(row)[1:] == ("the film was good<|im_end|>", "the film is<|im_end|>")


@pytest.mark.parametrize("change", [str.strip, lambda text: text.replace("\n", "\r\n")])
def test_dialogues_that_lost_their_leading_lines_or_came_from_windows_would_be_all_response(parts, change):
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant:"
    row = {"chosen": change(f"{shared} yes"), "rejected": change(f"{shared} no")}
    assert parts(row) == (change(shared), " yes<|im_end|>", " no<|im_end|>")


DIALOGUE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
NOTHING = [
    {"chosen": DIALOGUE, "rejected": f"{DIALOGUE} no"},
    {"chosen": f"{DIALOGUE} ", "rejected": f"{DIALOGUE} no"},
    {"chosen": f"{DIALOGUE} yes", "rejected": DIALOGUE},
    {"chosen": DIALOGUE, "rejected": DIALOGUE},
    {"chosen": f"{DIALOGUE} yes", "rejected": ""},
    {"prompt": DIALOGUE, "chosen": DIALOGUE, "rejected": f"{DIALOGUE} no"},
    {"prompt": "a", "chosen": "", "rejected": "no"},
    {"prompt": "a", "chosen": "yes", "rejected": " \n"},
    {"prompt": [ASK], "chosen": "yes", "rejected": ""},
    {"prompt": [ASK], "chosen": [says("")], "rejected": [says("no")]},
    {"chosen": [ASK, says("yes")], "rejected": [ASK, says(" ")]},
]


@pytest.mark.parametrize("row", NOTHING)
@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True}])
def test_a_blank_response_would_be_preferred_or_end_in_a_turn_before(load, caplog, row, options):
    with caplog.at_level(logging.INFO):
        data = load({"prompt": "a", "chosen": "b", "rejected": "c"}, row, **options)
    assert [pair.where[-1] for pair in data.pairs] == ["1"]
    assert (data.num_blank, data.blank[0][-1]) == (1, "2")
    assert (data.num_overlong, data.num_identical) == (0, 0)
    assert "1 of 2 rows left out: pairs with a blank response" in caplog.text
    with pytest.raises(DataError, match=r"none of 1 pairs can be used .*1 have a blank response\)"):
        load(row, **options)


def test_hh_dialogues_would_not_become_messages_on_demand(parts):
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: More\n\nAssistant:"
    talk = [ASK, says("Hello"), {"role": "user", "content": "More"}]
    expected = parts({"prompt": talk, "chosen": "yes", "rejected": "no"})
    row = {"chosen": f"{shared} yes", "rejected": f"{shared} no"}
    assert parts(row, apply_chat_template=True) == expected
    row = {"prompt": shared, "chosen": " yes", "rejected": " no"}
    assert parts(row, apply_chat_template=True) == expected


def test_the_end_of_a_turn_that_ends_generation_would_get_another_end_behind_it(parts, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|eot|>")
    row = {"prompt": [ASK], "chosen": "yes", "rejected": "no"}
    stop = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert parts(row, stop_token_ids=(stop,))[1:] == ("yes<|eot|>", "no<|eot|>")


def test_margin_or_weight_of_a_pair_would_be_lost(load):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = [
        pair,
        pair | {"margin": 0.5, "weight": 2},
        pair | {"margin": "-1.5", "weight": "0"},
        pair | {"margin": ""},
    ]
    assert [(one.margin, one.weight) for one in load(*rows).pairs] == [
        (None, 1.0),
        (0.5, 2.0),
        (-1.5, 0.0),
        (None, 1.0),
    ]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("margin", "far"),
        ("margin", True),
        ("margin", [1]),
        ("weight", float("nan")),
        ("weight", 1e999),
        ("weight", -1),
    ],
)
def test_a_margin_or_weight_that_is_no_number_would_reach_the_loss(load, column, value):
    with pytest.raises(DataError, match=rf"pairs\.jsonl:1: '{column}' is .*: write a"):
        load({"prompt": "a", "chosen": "b", "rejected": "c", column: value})


def test_hh_dialogues_would_be_split_elsewhere_than_at_the_last_shared_assistant_turn(parts):
    shared = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tell me\n\nAssistant:"
    row = {"chosen": f"{shared} I will", "rejected": f"{shared} I won't"}
    assert parts(row) == (shared, " I will<|im_end|>", " I won't<|im_end|>")


def test_an_hh_response_that_contains_nothing_else_than_the_others_start_would_be_lost(parts):
    shared = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": f"{shared} No", "rejected": f"{shared} No way"}
    assert parts(row) == (shared, " No<|im_end|>", " No way<|im_end|>")


def test_pairs_would_be_left_out_in_silence(load, caplog):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 9, "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": "c" * 9},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ]
    with caplog.at_level(logging.INFO):
        data = load(*rows, max_length=10)
    assert [pair.where[-1] for pair in data.pairs] == ["1"]
    assert (data.num_overlong, data.num_identical) == (2, 1)
    assert [where[-1] for where in (*data.overlong, *data.identical)] == ["2", "3", "4"]
    assert "2 of 4 rows left out: pairs with more than max_length=10" in caplog.text
    assert "1 of 4 rows left out: pairs whose chosen and rejected" in caplog.text
    with pytest.raises(DataError, match="none of 2 pairs can be used"):
        load(*rows[1:3], max_length=10)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "pairs.jsonl:1: the column 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "pairs.jsonl:1: 'rejected' must be a text"),
        (
            {"prompt": [ASK, says("")], "chosen": "b", "rejected": "c"},
            "pairs.jsonl:1: message 2 of 'prompt' is blank",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"},
            "pairs.jsonl:1: .*a dialogue.*make them alike",
        ),
        ({"chosen": "b", "rejected": [says("c")]}, "pairs.jsonl:1: .*make them alike"),
        ({"chosen": "b", "rejected": 3}, "pairs.jsonl:1: 'rejected' must be"),
        ({"chosen": [says("b")], "rejected": [says("c")]}, "pairs.jsonl:1: .*share no first message"),
        (
            {"chosen": [ASK, says("b")], "rejected": [ASK, {"role": "user", "content": "c"}]},
            "pairs.jsonl:1: .*at an assistant message",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "pairs.jsonl:1: .*share no Assistant turn",
        ),
    ],
)
def test_a_bad_pair_would_be_reported_without_its_line(load, row, message):
    with pytest.raises(DataError, match=message):
        load(row)


def test_a_missing_end_of_sequence_token_would_give_a_traceback(load, tokenizer):
    tokenizer.eos_token = None
    row = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
    with pytest.raises(DataError, match=r"no end-of-sequence token: set data\.append_eos=false"):
        load(row)
    assert len(load(row, append_eos=False).pairs) == 1


@pytest.mark.skipif(not HH.is_file(), reason="the shared HH sample is not here")
def test_a_real_hh_dialogue_would_not_be_split_at_its_answer(tokenizer):
    data = load_preferences(str(HH), tokenizer, max_length=4000)
    assert len(data.pairs) + data.num_overlong + data.num_identical + data.num_blank == 1500
    rows = [json.loads(line) for line in HH.read_text(encoding="utf-8").splitlines()]
    ends = [[row[side].rpartition("\n\nAssistant:")[2].strip() for side in ("chosen", "rejected")] for row in rows]
    assert [int(where.rpartition(":")[2]) for where in data.blank] == [
        number for number, said in enumerate(ends, start=1) if not all(said)
    ]
    assert len(data.pairs) > 1300
    for pair in data.pairs:
        assert tokenizer.decode(pair.chosen[: pair.num_prompt_tokens]).endswith("\n\nAssistant:")
        assert "\n\nHuman:" not in tokenizer.decode(pair.chosen[pair.num_prompt_tokens :])
