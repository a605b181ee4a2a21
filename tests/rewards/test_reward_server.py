"""A reward server of OpenRLHF's kind, on this machine: what it is asked, and every way in which it may fail."""

import time

import pytest
from local_server import local_servers
from reward_batches import rollout, score_spec

from meshift.errors import RewardError
from meshift.rewards import http


@pytest.fixture
def serve(monkeypatch):
    """`serve(act)` -> a server whose `url` answers by `act(handler, body)` and whose `asked` remembers."""
    with local_servers(monkeypatch, "/get_reward") as start:
        yield start


def answers(*said):
    """Say these in turn, the last one ever after."""
    left = list(said)

    def act(handler, body):
        status, body = left.pop(0) if len(left) > 1 else left[0]
        handler.say(status, body)

    return act


BATCH = {"prompts": ["abh", "c"], "completions": ["deh", "fga"], "label": ["x", 2]}


def test_a_server_is_asked_as_openrlhf_asks_it(serve):
    server = serve(answers((200, {"rewards": [0.5, -1.0], "extra_logs": {"hits": [1, 0], "share": 0.25}})))
    scores, metrics = score_spec(server.url, rollout(**BATCH), weight=2.0)
    assert scores == [1.0, -2.0]
    assert metrics == {
        "reward/get_reward": -0.25,
        "reward/get_reward/hits": 0.5,
        "reward/get_reward/share": 0.25,
    }
    query = {"query": ["ab<end>de<end>", "cfga"], "prompts": ["ab<end>", "c"], "labels": ["x", 2]}
    [asked] = server.asked
    assert (asked.path, asked.headers["Content-Type"], asked.body) == ("/get_reward", "application/json", query)


def test_scores_are_taken_where_there_are_no_rewards(serve):
    assert score_spec(serve(answers((200, {"scores": [1, True]}))).url)[0] == [1.0, 1.0]


def test_a_server_that_is_busy_is_asked_again(serve):
    server = serve(answers((503, b""), (429, b""), (200, {"rewards": [1.0, 2.0]})))
    assert score_spec(server.url)[0] == [1.0, 2.0]
    assert len(server.asked) == 3


def test_a_server_that_stays_busy_has_all_the_time_there_is_and_says_when_to_come_again(serve):
    server = serve(answers(*[(429, b"")] * 7, (200, {"rewards": [1.0, 2.0]})))
    assert score_spec(server.url)[0] == [1.0, 2.0]
    assert len(server.asked) == 8

    times = []

    def act(handler, body):
        times.append(time.monotonic())
        if len(times) == 1:
            return handler.say(503, b"", **{"Retry-After": "1"})
        return handler.say(200, {"rewards": [1.0, 2.0]})

    assert score_spec(serve(act).url)[0] == [1.0, 2.0]
    assert times[1] - times[0] >= 1


def test_a_server_that_is_busy_for_longer_than_there_is_time_is_a_timeout_that_says_so(serve):
    server = serve(lambda handler, body: handler.say(429, b"", **{"Retry-After": "600"}))
    with pytest.raises(
        RewardError, match=r"no answer within timeout_s = 30, but status 429 on a batch .*raise its timeout_s"
    ):
        score_spec(server.url, timeout_s=30)
    assert len(server.asked) == 1  # and nobody waited for what cannot be
    _, metrics = score_spec(server.url, timeout_s=30, on_error="skip")
    assert metrics["reward/get_reward/num_timeouts"] == 2


@pytest.mark.parametrize(
    ("said", "wait"),
    [
        ("120", 120.0),
        ("Thu, 01 Jan 1970 00:02:00 GMT", 20.0),
        ("Thu, 01 Jan 1970 00:01:00 GMT", 0.0),
        ("-1", None),
        ("soon", None),
        ("Fri, 99 Foo 1970 99:99:99 GMT", None),
        (None, None),
    ],
)
def test_when_to_come_again_is_read_in_seconds_and_as_a_date(said, wait):
    assert http.wait_of(said, 100.0) == wait


def test_a_connection_that_breaks_is_tried_again(serve):
    def act(handler, body):
        if len(handler.server.asked) > 1:
            return handler.say(200, {"rewards": [1.0, 2.0]})
        handler.close_connection = True
        return handler.connection.close()

    assert score_spec(serve(act).url)[0] == [1.0, 2.0]


def test_a_server_that_is_not_there_is_named_after_a_few_tries(serve):
    server = serve(answers((200, {})))
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match=r"get_reward got no answer from http://127.* in 5 tries .* batch of 2"):
        score_spec(server.url)
    scores, metrics = score_spec(server.url, on_error="skip")
    assert (scores, metrics["reward/get_reward/num_errors"]) == ([0.0, 0.0], 2)


@pytest.mark.parametrize("way", ["silent", "drop by drop", "headers drop by drop"])
def test_a_server_that_hangs_is_given_up_in_time(serve, way):
    def act(handler, body):
        released = handler.server.released
        if way == "silent":
            released.wait(60)
            return
        if way == "drop by drop":
            handler.send_response(200)
            handler.end_headers()
        else:
            handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Slow: ")
        while not released.wait(0.05):
            handler.wfile.write(b" ")

    url = serve(act).url
    started = time.monotonic()
    with pytest.raises(
        RewardError, match=r"get_reward gave no answer within timeout_s = 0\.5 on a batch of 2 samples"
    ):
        score_spec(url, timeout_s=0.5)
    _, metrics = score_spec(url, timeout_s=0.5, on_error="skip")
    assert metrics["reward/get_reward/num_timeouts"] == 2
    assert time.monotonic() - started < 30


def test_a_redirect_is_not_followed(serve):
    other = serve(answers((200, {"rewards": [1.0, 2.0]})))
    server = serve(lambda handler, body: handler.say(302, b"", Location=other.url))
    with pytest.raises(RewardError, match=r"got status 302 from http://127.* a redirect, which is not followed"):
        score_spec(server.url)
    assert not other.asked


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"<html>", "got an answer that is not JSON: b'<html>'"),
        (b"[1.0, 2.0]", "got an answer that is no JSON object with 'rewards'"),
        (b'{"reward": [1.0, 2.0]}', r"returned a dictionary of \['reward'\] without 'rewards' or 'scores'"),
        (b'{"rewards": [1.0, NaN]}', r"returned nan on sample 1 \(data.jsonl:2\)"),
        (b'{"rewards": [1.0, "2"]}', "returned '2', which is no number, on sample 1"),
        (b'{"rewards": 1.0}', "returned float instead of a list"),
    ],
)
def test_an_answer_that_cannot_be_read_is_named(serve, body, sentence):
    with pytest.raises(RewardError, match=f"get_reward {sentence}"):
        score_spec(serve(answers((200, body))).url)


def test_a_sample_that_the_server_fails_on_is_found(serve):
    def act(handler, body):
        queries = body["query"]
        handler.say(*((500, b"") if "cfga" in queries else (200, {"rewards": [3.0] * len(queries)})))

    url = serve(act).url
    with pytest.raises(RewardError, match=r"got status 500 from .*get_reward on sample 1 \(data.jsonl:2\)"):
        score_spec(url)
    assert score_spec(url, on_error="skip")[0] == [3.0, 0.0]
