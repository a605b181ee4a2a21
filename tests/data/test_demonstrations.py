import json
import logging
from pathlib import Path

import pytest
from chat_templates import ALL, marked, plain, says, user

from meshift.data.demonstrations import load_demonstrations
from meshift.data.preferences import load_preferences
from meshift.data.prompts import load_prompts
from meshift.errors import DataError

HH = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_harmless_dev.jsonl"
TALK = [user("One?"), says("Yes"), user("Two?"), says("No")]
HUMAN = "\n\nHuman: One?\n\nAssistant: Yes\n\nHuman: Two?\n\nAssistant:"


@pytest.fixture
def load(write_rows, tokenizer):
    def load(*rows, **options):
        return load_demonstrations(
            write_rows(*rows), tokenizer, **{"max_length": 500, "loss_on": "completion", **options}
        )

    return load


@pytest.fixture
def trained(load, tokenizer):
    """(the whole text, the trained pieces) of the only demonstration of `row`."""

    def trained(row, **options):
        (one,) = load(row, **options).demonstrations
        assert len(one.tokens) == len(one.loss_mask)
        pieces = [[]]
        for token, is_trained in zip(one.tokens, one.loss_mask, strict=True):
            pieces[-1].append(token) if is_trained else pieces.append([])
        return tokenizer.decode(one.tokens), [tokenizer.decode(piece) for piece in pieces if piece]

    return trained


@pytest.mark.parametrize(
    ("row", "completion", "assistant"),
    [
        ({"messages": TALK}, ["No<|im_end|>"], ["Yes<|im_end|>", "No<|im_end|>"]),
        ({"prompt": TALK[:3], "completion": TALK[3:]}, ["No<|im_end|>"], ["Yes<|im_end|>", "No<|im_end|>"]),
        ({"prompt": TALK[:3], "completion": "No"}, ["No<|im_end|>"], ["Yes<|im_end|>", "No<|im_end|>"]),
        ({"prompt": "One?", "completion": [says("No")]}, ["No<|im_end|>"], ["No<|im_end|>"]),
        ({"prompt": "One?", "completion": " No"}, [" No<|im_end|>"], [" No<|im_end|>"]),
        ({"text": "One. No"}, ["One. No<|im_end|>"], ["One. No<|im_end|>"]),
        ({"text": f"{HUMAN} No"}, [" No<|im_end|>"], [" Yes", " No<|im_end|>"]),
        ({"prompt": HUMAN, "completion": " No"}, [" No<|im_end|>"], [" Yes", " No<|im_end|>"]),
        ({"chosen": f"{HUMAN} No", "rejected": f"{HUMAN} Go"}, [" No<|im_end|>"], [" Yes", " No<|im_end|>"]),
        (
            {"chosen": TALK, "rejected": [*TALK[:3], says("Go")]},
            ["No<|im_end|>"],
            ["Yes<|im_end|>", "No<|im_end|>"],
        ),
    ],
)
def test_other_tokens_than_the_assistants_would_be_trained_on(trained, row, completion, assistant):
    whole, pieces = trained(row)
    assert pieces == completion
    assert trained(row, loss_on="assistant") == (whole, assistant)
    assert trained(row, loss_on="all") == (whole, [whole])
    assert whole.endswith("<|im_end|>")


def test_hh_dialogues_would_not_become_messages_on_demand(trained):
    whole, _ = trained({"messages": TALK})
    for row in ({"text": f"{HUMAN} No"}, {"chosen": f"{HUMAN} No", "rejected": f"{HUMAN} Go"}):
        assert trained(row, apply_chat_template=True)[0] == whole
        assert trained(row, apply_chat_template=True, loss_on="assistant")[1] == ["Yes<|im_end|>", "No<|im_end|>"]
    asked = trained({"prompt": "One?", "completion": " No"}, apply_chat_template=True)
    assert asked == trained({"messages": [user("One?"), says("No")]})


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("loss_on", ["completion", "assistant"])
def test_tokens_trained_on_would_differ_from_transformers_own_mask(load, tokenizer, family, loss_on):
    tokenizer.bos_token = "<|head|>"
    tokenizer.chat_template = plain(ALL[family])
    stops = (tokenizer.convert_tokens_to_ids("<|eot|>"),)
    (found,) = load({"messages": TALK}, loss_on=loss_on, stop_token_ids=stops).demonstrations
    expected = tokenizer.apply_chat_template(
        TALK, chat_template=marked(ALL[family]), return_assistant_tokens_mask=True, return_dict=True
    )
    asked = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=True)["input_ids"]
    mask = [
        bool(said) and (loss_on == "assistant" or place >= len(asked))
        for place, said in enumerate(expected["assistant_masks"])
    ]
    num = len(found.tokens)
    assert found.tokens == expected["input_ids"][:num]
    assert found.loss_mask == mask[:num]
    assert not any(mask[num:]), "only what the template writes behind the last turn may be left out"


def test_the_prompt_of_training_would_not_be_the_prompt_of_generation(write_rows, merging_tokenizer):
    rows = [
        {"prompt": "Well?\n", "completion": "\nNo y"},
        {"prompt": TALK[:3], "completion": "\ny"},
        {"prompt": HUMAN, "completion": " y"},
        {"prompt": "Go ", "completion": "y"},
    ]
    for row in rows:
        path = write_rows(row)
        (prompt,) = load_prompts(path, merging_tokenizer, max_prompt_length=500).prompts
        for loss_on in ("completion", "assistant"):
            (one,) = load_demonstrations(path, merging_tokenizer, max_length=500, loss_on=loss_on).demonstrations
            assert one.tokens[: len(prompt.tokens)] == prompt.tokens
            assert one.loss_mask[len(prompt.tokens) :] == [True] * (len(one.tokens) - len(prompt.tokens))
        pairs = write_rows({"prompt": row["prompt"], "chosen": row["completion"], "rejected": "x"}, name="p.jsonl")
        (pair,) = load_preferences(pairs, merging_tokenizer, max_length=500).pairs
        assert pair.chosen == one.tokens
        assert pair.num_prompt_tokens == len(prompt.tokens)


def test_a_demonstration_would_end_twice_or_never(trained, tokenizer):
    tokenizer.chat_template = plain(ALL["headers"])
    tokenizer.bos_token = "<|head|>"
    eot = tokenizer.convert_tokens_to_ids("<|eot|>")
    assert trained({"messages": TALK}, stop_token_ids=(eot,))[1] == ["No<|eot|>"]
    assert trained({"messages": TALK})[1] == ["No<|eot|><|im_end|>"]
    assert trained({"messages": TALK}, append_eos=False)[1] == ["No<|eot|>"]
    assert trained({"text": "No<|im_end|>\n"})[1] == ["No<|im_end|>"]
    assert trained({"text": "No"}, append_eos=False)[1] == ["No"]


def test_overlong_demonstrations_would_be_cut_or_left_out_in_silence(load, tokenizer, caplog):
    rows = [{"prompt": "a", "completion": "b" * n} for n in (6, 7, 8, 20)]
    with caplog.at_level(logging.INFO):
        data = load(*rows, max_length=8)
    assert [(one.where[-1], one.truncated, len(one.tokens)) for one in data.demonstrations] == [("1", False, 8)]
    assert (data.num_overlong, data.num_truncated) == (3, 0)
    assert [where[-1] for where in data.overlong] == ["2", "3", "4"]
    assert "3 of 4 rows left out: demonstrations of more than max_length=8" in caplog.text
    cut = load(*rows, max_length=8, truncate=True)
    assert [(one.where[-1], one.truncated) for one in cut.demonstrations] == [
        ("1", False),
        ("2", True),
        ("3", True),
        ("4", True),
    ]
    assert (cut.num_overlong, cut.num_truncated) == (0, 3)
    for one in cut.demonstrations:
        assert len(one.tokens) == len(one.loss_mask) == 8
        assert (tokenizer.eos_token_id in one.tokens) is not one.truncated


def test_a_demonstration_cut_before_its_completion_would_teach_nothing_unnoticed(load):
    rows = [{"prompt": "a" * 9, "completion": "b"}, {"prompt": "a", "completion": "b"}]
    data = load(*rows, max_length=5, truncate=True)
    assert [one.where[-1] for one in data.demonstrations] == ["2"]
    assert data.num_overlong == 1
    with pytest.raises(DataError, match=r"none of 1 demonstrations can be used \(1 have more than max_length=5"):
        load(rows[0], max_length=5, truncate=True)


@pytest.mark.parametrize("false", [False, "false", "False", 0, "0", 0.0, "0.0"])
def test_a_dislike_as_csv_and_kto_files_write_it_would_be_imitated(load, false):
    rows = [{"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "c", "label": false}]
    assert [where[-1] for where in load(*rows).disliked] == ["2"]


@pytest.mark.parametrize("label", ["comedy", 3, None, 0.5])
def test_a_label_that_is_no_judgement_would_cost_its_row(load, label):
    assert load({"prompt": "a", "completion": "b", "label": label}).disliked == []


def test_disliked_completions_would_be_imitated(load, caplog):
    rows = [{"prompt": "a", "completion": text, "label": text == "b"} for text in "bc"]
    with caplog.at_level(logging.INFO):
        data = load(*rows)
    assert [one.where[-1] for one in data.demonstrations] == ["1"]
    assert [where[-1] for where in data.disliked] == ["2"]
    assert "1 of 2 rows left out: completions that are labelled false" in caplog.text


@pytest.mark.parametrize(
    ("blank", "good"),
    [
        ({"text": f"{HUMAN} "}, {"text": f"{HUMAN} No"}),
        ({"text": HUMAN}, {"text": HUMAN.strip() + " No"}),
        ({"text": " "}, {"text": f"{HUMAN} No"}),
        ({"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b"}),
        ({"prompt": TALK[:1], "completion": [says("")]}, {"prompt": TALK[:1], "completion": [says("b")]}),
        ({"messages": [user("a"), says(" ")]}, {"messages": TALK}),
        ({"chosen": HUMAN, "rejected": f"{HUMAN} No"}, {"chosen": f"{HUMAN} No", "rejected": HUMAN}),
    ],
)
def test_blank_answers_would_be_imitated_or_stop_the_run(load, caplog, blank, good):
    for options in ({}, {"apply_chat_template": True}):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            data = load(blank, good, **options)
        assert [one.where[-1] for one in data.demonstrations] == ["2"]
        assert [where[-1] for where in data.blank] == ["1"]
        assert "1 of 2 rows left out: demonstrations whose answer is blank" in caplog.text


def test_a_call_of_a_tool_would_be_taken_for_a_blank_answer(load):
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    assert load({"messages": [user("a"), call]}).blank == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, r"rows\.jsonl:2: the row has \['a'\], which is no demonstration: give 'messages'"),
        ({"prompt": "a"}, r"rows\.jsonl:2: .*is no demonstration"),
        ({"text": None}, r"rows\.jsonl:2: .*is no demonstration"),
        ({"text": 3}, r"rows\.jsonl:2: 'text' must be a text, not int"),
        (
            {"messages": TALK},
            r"rows\.jsonl:2: this row has messages, but .*rows\.jsonl:1 has text: put rows of one",
        ),
        ({"text": "a", "messages": TALK}, r"rows\.jsonl:2: the row has messages as well as text"),
    ],
)
def test_a_bad_row_would_be_reported_without_its_line(load, row, message):
    with pytest.raises(DataError, match=message):
        load({"text": "a"}, row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "a"}, "'messages' must be a non-empty list of messages, not str"),
        ({"messages": TALK[:3]}, "ends with a message of the role 'user'.*: end with the assistant's"),
        ({"messages": TALK[3:]}, "has an answer only: put the user's message before it"),
        ({"prompt": " ", "completion": "a"}, "'prompt' is blank"),
        ({"messages": [user("a"), says(""), user("b"), says("c")]}, "message 2 of 'messages' is blank"),
        ({"prompt": json.dumps(TALK[:1]), "completion": "a"}, "'prompt' is a text that holds a list of messages"),
        ({"prompt": "a", "completion": 3}, "'completion' must be a text or a non-empty list of messages, not int"),
        ({"prompt": TALK[:1], "completion": TALK[2:]}, "does not follow the prompt in the chat template's text"),
    ],
)
def test_a_bad_conversation_would_be_reported_without_its_line(load, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: .*{message}"):
        load(row)


def test_a_generation_prompt_that_the_answer_does_not_begin_with_would_be_split_anywhere(load, tokenizer):
    tokenizer.chat_template = plain(ALL["chatml"]).replace(
        "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: .*opens it with '.*<think>\\n': part prompt and response"
    ):
        load({"messages": TALK})
    assert load({"messages": [TALK[0], says("<think>\nhm\n</think>\n\nNo")]}).demonstrations


def test_a_plain_text_would_be_put_into_a_template_as_nobodys(load):
    with pytest.raises(DataError, match=r"rows\.jsonl:1: apply_chat_template is on, but 'text' is no dialogue"):
        load({"text": "a"}, apply_chat_template=True)


def test_a_missing_end_of_sequence_token_would_give_a_traceback(load, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match=r"no end-of-sequence token: set data\.append_eos=false"):
        load({"text": "a"})
    assert load({"text": "a"}, append_eos=False).demonstrations


def test_extra_columns_of_hub_datasets_would_be_taken_for_another_form(trained):
    extra = {"prompt": "One?", "prompt_id": "x", "chosen": TALK, "rejected": TALK}
    assert trained({"messages": TALK} | extra)[1] == ["No<|im_end|>"]


@pytest.mark.skipif(not HH.is_file(), reason="the shared HH sample is not here")
def test_the_answers_of_real_dialogues_would_not_be_what_is_trained_on(tokenizer):
    rows = [json.loads(line) for line in HH.read_text(encoding="utf-8").splitlines()[:200]]
    data = load_demonstrations(f"{HH}[:200]", tokenizer, max_length=10**6, loss_on="completion")
    assert len(data.demonstrations) + len(data.blank) == 200
    for one in data.demonstrations:
        chosen = rows[int(one.where.rpartition(":")[2]) - 1]["chosen"]
        said = [token for token, trained in zip(one.tokens, one.loss_mask, strict=True) if trained]
        assert tokenizer.decode(said) == chosen.rpartition("\n\nAssistant:")[2] + "<|im_end|>"
        assert tokenizer.decode(one.tokens) == chosen + "<|im_end|>"
