import pytest
from chat_templates import says, user

from meshift.data.chat import check_messages, render, tokens_inside
from meshift.errors import DataError

CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "'prompt' must be a text or a non-empty list of messages"),
        ([], "and this list is empty"),
        ({"role": "user"}, "not dict"),
        (["Hi"], "message 1 of 'prompt' must be an object"),
        ([user("a"), {"role": "assistant"}], "message 2 of 'prompt' must be an object with texts"),
        ([user(None)], "message 1 of 'prompt' must be an object with texts"),
        (
            [user([{"type": "image", "image": "a.png"}])],
            "message 1 .* has a part of the type 'image': only texts are",
        ),
        ([user([{"type": "text", "text": "a"}, "b"])], "message 1 of 'prompt' has a content whose part 2 is none"),
        ([user([{"type": "text"}])], "message 1 of 'prompt' has a content whose part 1 is none"),
        ([user([{"type": "text", "text": " "}])], "message 1 of 'prompt' is blank"),
        ([user([])], "message 1 of 'prompt' is blank"),
        ([{"role": 1, "content": "a"}], "message 1 of 'prompt' must be an object with texts"),
        ([{"from": "human", "value": "a"}], "'from' and 'value': write them as 'role' and 'content'"),
        ([{"role": "human", "content": "a"}], "has the role 'human': write 'user'"),
        ([{"role": "User", "content": "a"}], "has the role 'User': use one of system, developer, user"),
        ([user(" \n")], "message 1 of 'prompt' is blank"),
        ([user("a"), says("")], "message 2 of 'prompt' is blank"),
        ([user("a"), {"role": "assistant", "tool_calls": []}], "message 2 of 'prompt' must be an object"),
    ],
)
def test_bad_messages_would_be_reported_without_their_place(messages, message):
    with pytest.raises(DataError, match=rf"^a\.jsonl:3: .*{message}"):
        check_messages(messages, "prompt", "a.jsonl:3")


def test_a_content_in_parts_would_be_refused_or_cut():
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two", "image": None}]
    message = {"role": "user", "content": parts, "name": None}
    assert check_messages([message], "prompt", "a.jsonl:3") == [user("one, two")]
    assert message["content"] == parts


def test_blank_system_messages_tool_answers_or_calls_without_a_text_would_be_refused():
    messages = [
        {"role": "system", "content": ""},
        user("1 + 1?"),
        CALL,
        {"role": "tool", "content": ""},
        says("2"),
    ]
    checked = check_messages(messages, "prompt", "a.jsonl:3")
    assert checked == [*messages[:2], CALL | {"content": ""}, *messages[3:]]
    assert "content" not in CALL


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0]['content'] + none }}",
        "{{ messages[0]['content']['x'].y }}",
        "{{ 1 / 0 }}",
        "{% for %}",
    ],
)
def test_whatever_a_template_raises_would_be_a_traceback(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template refuses these messages"):
        render(tokenizer, [user("Hi")], "a.jsonl:3", add_generation_prompt=True)


def test_the_wrong_one_of_several_templates_would_be_used(tokenizer):
    tokenizer.chat_template = {"default": "plain", "tool_use": "with tools"}
    options = {"where": "a.jsonl:3", "add_generation_prompt": False}
    assert render(tokenizer, [user("Hi")], **options) == "plain"
    assert render(tokenizer, [user("Hi")], **options, tools=[{"name": "add"}]) == "with tools"
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(DataError, match=r"a\.jsonl:3: the tokenizer has several chat templates \(rag\)"):
        render(tokenizer, [user("Hi")], **options)


def test_a_token_would_be_trained_on_that_begins_outside_of_the_turn():
    spans = [(3, 6)]
    offsets = [(0, 0), (1, 4), (3, 3), (3, 5), (5, 8), (6, 6), (6, 7)]
    #          BOS    across  blank   inside  across  blank within  outside
    assert tokens_inside(offsets, spans) == [False, False, False, True, True, True, False]
