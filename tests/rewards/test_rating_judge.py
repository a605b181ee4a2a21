"""The reward function `judge` against a chat endpoint on this machine: what it is asked, and how it may fail."""

import pytest
from chat_server import chat_servers
from reward_batches import rollout, score_spec

from meshift.config.reward_kwargs import ChatEndpointConfig
from meshift.config.sections import RewardFunctionConfig
from meshift.errors import ConfigError, RewardError
from meshift.rewards.chat_endpoint import ChatEndpoint
from meshift.rewards.configured import check_columns, load_functions
from meshift.rewards.rating import fill_in


@pytest.fixture
def serve(monkeypatch):
    yield from chat_servers(monkeypatch)


def judged(server, batch=None, keys=None, **kwargs):
    return score_spec("judge", batch, kwargs={"url": server.url, "model": "m", **kwargs}, **(keys or {}))


def by_completion(**answers):
    """Answer by which completion the question shows; the texts of the tests' completions differ."""
    return lambda question: next(
        a for text, a in answers.items() if f"]\n{text}\n" in question["messages"][0]["content"]
    )


def test_ratings_become_rewards_and_the_judge_is_asked_as_openai_is(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    server = serve(by_completion(de="It is fine.\nRating: 7.5", fga="**Rating:** 2"))
    scores, metrics = judged(server, api_key_env="JUDGE_KEY", max_tokens=99)
    assert scores == pytest.approx([0.75, 0.2])
    assert metrics == pytest.approx({"reward/judge": 0.475, "reward/judge/rating": 4.75})
    assert len(server.asked) == 2
    for path, headers, question in server.asked:
        assert (path, headers["Authorization"]) == ("/v1/chat/completions", "Bearer secret")
        assert (question["model"], question["temperature"], question["max_tokens"]) == ("m", 0.0, 99)
    [shown] = [q["messages"] for _, _, q in server.asked if "]\nde\n" in q["messages"][0]["content"]]
    assert "[The user's words]\nab\n" in shown[0]["content"]


def test_models_that_refuse_a_temperature_and_max_tokens_would_refuse_every_question(serve):
    server = serve(lambda question: "Rating: 5")
    assert judged(server, max_tokens=None, temperature=None)[0] == pytest.approx([0.5, 0.5])
    for _, _, question in server.asked:
        assert sorted(question) == ["messages", "model"]


def test_an_answer_that_cannot_be_read_is_asked_for_again_in_the_same_conversation(serve):
    def answer(question):
        return "Rating: 3" if len(question["messages"]) == 3 else "I would say eleven."

    server = serve(answer)
    assert judged(server)[0] == pytest.approx([0.3, 0.3])
    again = next(q["messages"] for _, _, q in server.asked if len(q["messages"]) == 3)
    assert again[1] == {"role": "assistant", "content": "I would say eleven."}
    assert "Rating: <a number from 0 to 10>" in again[2]["content"]


@pytest.mark.parametrize(
    ("said", "reward"),
    [
        ("Rating: 8", 0.8),
        ("Rating (0-10): 8", 0.8),
        ("**Final rating** (from 0 to 10): **8**/10", 0.8),
        ("Rating: [8.5].", 0.85),
        ("Rating: .5", 0.05),
        ("Rating: 8\nA lower rating 3 would be harsh.", 0.8),
        ("Rating: 8\n- 2 points for style", 0.8),
        ("Rating: 2, at first.\nRating: 10", 1.0),
    ],
)
def test_ratings_are_read_as_models_write_them(serve, said, reward):
    assert judged(serve(lambda question: said))[0] == pytest.approx([reward, reward])


@pytest.mark.parametrize(
    "said",
    [
        "eleven",
        "Rating: 11",
        "Rating: -1",
        "",
        "Rating: 8.5%",
        "Rating: 8 %",
        "Rating: 7-8",
        "Rating: 7 to 8",
        "A rating 3 would be harsh.",
    ],
)
def test_a_rating_that_cannot_be_had_names_its_sample(serve, said):
    server = serve(by_completion(de="Rating: 5", fga=said))
    with pytest.raises(
        RewardError, match=r"judge got no line 'Rating: .* in 2 tries .* on sample 1 \(data.jsonl:2\)"
    ):
        judged(server)
    scores, metrics = judged(server, keys={"on_error": "skip"})
    assert (scores, metrics["reward/judge/num_errors"]) == ([0.5, 0.0], 1)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ((500, {}), "got status 500 from http://127.*/v1/chat/completions on sample 0"),
        ((200, {"choices": []}), r"got an answer without choices\[0\].message.content on sample 0"),
        ((200, [1]), "got an answer that is no JSON object with 'choices' on sample 0"),
        ((200, {"choices": [{"message": {"content": None}}]}), "got an answer without"),
    ],
)
def test_answers_that_are_no_chat_are_named(serve, answer, sentence):
    with pytest.raises(RewardError, match=f"judge {sentence}"):
        judged(serve(lambda question: answer))


def test_a_busy_server_is_asked_again(serve):
    left = [(503, {}), (429, {})]
    assert judged(serve(lambda question: left.pop() if left else "Rating: 10"))[0] == [1.0, 1.0]


def test_a_judge_that_hangs_on_a_sample_costs_that_sample(serve):
    server = serve(by_completion(de="Rating: 10", fga=None))
    scores, metrics = judged(server, keys={"on_error": "skip"}, timeout_s=0.5)
    assert (scores, metrics["reward/judge/num_timeouts"]) == ([1.0, 0.0], 1)
    with pytest.raises(
        RewardError, match=r"judge gave no answer within timeout_s = 0\.5 on sample 1 .*raise its timeout_s"
    ):
        judged(server, timeout_s=0.5)


def test_after_five_questions_without_an_answer_the_others_are_not_put(serve):
    server = serve(lambda question: None)
    batch = rollout(prompts=["a"] * 12, completions=["de"] * 12)
    _, metrics = judged(server, batch, keys={"on_error": "skip"}, timeout_s=0.2, num_concurrent=1)
    assert len(server.asked) == 5
    assert (metrics["reward/judge/num_timeouts"], metrics["reward/judge/num_errors"]) == (5, 7)


def test_questions_without_an_answer_count_in_a_row_and_progress_comes_to_its_end(serve):
    said = [None, None, None, None, "Rating: 1", None, None, None, None, (500, {}), None, None, None, None, None]
    left = list(said)
    server = serve(lambda question: left.pop(0))
    config = ChatEndpointConfig(url=server.url, model="m", timeout_s=0.2, num_concurrent=1)
    heard = []
    found = ChatEndpoint(config, str).ask_all(["?"] * 18, lambda done, failed: heard.append((done, failed)))
    assert len(server.asked) == 15
    assert found[4] == "Rating: 1"
    assert [fault.kind for fault in found if fault != "Rating: 1"] == (
        ["timeout"] * 8 + ["status 500"] + ["timeout"] * 5 + ["not tried"] * 3
    )
    assert heard == [(i + 1, i + 1 if i < 4 else i) for i in range(18)], "what failed would look answered"


def test_columns_of_the_data_can_be_shown_and_unknown_ones_are_refused(serve):
    server = serve(lambda question: "Rating: 1")
    question = "Is {completion} as good as {answer}? {lowest} to {highest}"
    judged(server, rollout(answer=["x{prompt}", "y"]), question=question)
    assert sorted(q["messages"][0]["content"] for _, _, q in server.asked) == [
        "Is de as good as x{prompt}? 0 to 10",
        "Is fga as good as y? 0 to 10",
    ]
    config = RewardFunctionConfig(
        function="judge", kwargs={"url": server.url, "model": "m", "question": "{completion} {anwser}"}
    )
    with pytest.raises(ConfigError, match=r"shows \{anwser\}, which is no column"):
        check_columns(load_functions([config]), ["prompt", "answer"])


def test_what_a_completion_says_is_not_filled_in():
    assert fill_in("{completion}!", {"completion": "{prompt}", "prompt": "x"}) == "{prompt}!"
