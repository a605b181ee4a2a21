"""Functions that hang in the run's own process, with no timeout_s: named while they do, and ended in the end."""

import asyncio
import contextlib
import logging
import re
import signal
import socket
import threading
import time

import pytest
from reward_batches import host_call, rollout, score_spec

from meshift.errors import RewardError
from meshift.rewards import hanging
from meshift.rewards.functions import WeightedFunction


def called(function, on_error="stop"):
    batch = rollout()
    weighted = WeightedFunction(name=function.__name__, function=function, weight=1.0, on_error=on_error)
    outcome = host_call([weighted], batch)(batch)
    return outcome.batch["function_scores"].values.tolist(), outcome.metrics


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(hanging, "ENDED_AFTER_S", 0.3)
    monkeypatch.setattr(hanging, "AGAIN_S", 0.1)


def sleeping(data_source, solution_str, ground_truth, extra_info=None):
    while "f" in solution_str:
        time.sleep(600)
    return 1.0


def catching(data_source, solution_str, ground_truth, extra_info=None):
    while "f" in solution_str:
        with contextlib.suppress(Exception):
            time.sleep(600)
    return 1.0


def backtracking(completions, **columns):
    return [
        float(re.fullmatch(r"(x+x+)+y", "x" * 40 if "f" in text else "xxy") is not None) for text in completions
    ]


@pytest.mark.parametrize("function", [sleeping, catching, backtracking])
def test_a_call_that_never_ends_names_its_sample_and_line_and_ends(soon, function):
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        called(function)
    assert time.monotonic() - started < 20
    said = str(caught.value)
    assert f"reward function {function.__name__} gave no answer within 0.3 s ({__file__}, line " in said
    assert "sample 1 (data.jsonl:2)" in said
    assert "timeout_s (or set one)" in said
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_coroutine_that_waits_for_ever_names_its_sample(soon):
    async def waiting(data_source, solution_str, ground_truth, extra_info=None):
        if "f" in solution_str:
            await asyncio.sleep(600)
        return 1.0

    with pytest.raises(RewardError, match=r"waiting gave no answer within 0.3 s on sample 1 \(data.jsonl:2\)"):
        called(waiting)


def test_a_coroutine_that_blocks_the_loop_does_not_freeze_the_run(soon):
    release = threading.Event()

    async def blocking(completions, **columns):
        release.wait(20)
        return [1.0, 1.0]

    started = time.monotonic()
    try:
        with pytest.raises(
            RewardError, match="blocking keeps the event loop from going on; await what takes long"
        ):
            called(blocking)
    finally:
        release.set()
    assert time.monotonic() - started < 10


def test_the_pulse_of_the_step_before_would_end_this_one(soon):
    async def waiting(completions, **columns):
        await asyncio.sleep(0.01)
        return [1.0, 1.0]

    batch = rollout()
    rewards = host_call([WeightedFunction(name="waiting", function=waiting, weight=1.0)], batch)
    rewards(batch)
    [caller] = rewards._callers
    assert caller.invoke.pulse
    caller.invoke.pulse[:] = [time.monotonic() - 1000]
    assert rewards(batch).batch["function_scores"].values.tolist() == [1.0, 1.0]
    assert time.monotonic() - caller.invoke.pulse[0] < 100


def test_a_server_that_never_answers_does_not_freeze_the_run(soon, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/get_reward"
        with pytest.raises(RewardError, match=r"get_reward gave no answer within 0\.3 s"):
            score_spec(url)


def test_with_skip_the_other_samples_keep_their_rewards(soon):
    scores, metrics = called(sleeping, on_error="skip")
    assert scores[0] == 1.0
    assert scores[1] != scores[1]
    assert metrics["reward/sleeping/num_timeouts"] == 1


def test_functions_that_use_the_alarm_themselves_are_left_alone(soon):
    rung = []

    def own_alarm(completions, **columns):
        before = signal.signal(signal.SIGALRM, lambda *given: rung.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        time.sleep(0.5)
        signal.signal(signal.SIGALRM, before)
        return [1.0, 2.0]

    assert called(own_alarm)[0] == [1.0, 2.0]
    assert rung
    before = signal.signal(signal.SIGALRM, lambda *given: rung.append(2))
    try:
        with hanging.ended_if_hung(own_alarm):
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_slow_function_is_named_with_the_line_it_is_at(monkeypatch, caplog):
    monkeypatch.setattr(hanging, "SAID_AFTER_S", 0.1)

    def slow(completions, **columns):
        time.sleep(0.8)
        return [1.0, 2.0]

    async def waiting(completions, **columns):
        time.sleep(0.4)
        return [1.0, 2.0]

    with caplog.at_level(logging.WARNING):
        assert called(slow)[0] == [1.0, 2.0]
    said = [record.message for record in caplog.records]
    assert 2 <= len(said) <= 3, "after 0.1, 0.2 and 0.4 s"
    assert re.match(
        rf"reward function slow has been at work for 0 s \({re.escape(__file__)}, line \d+\);", said[0]
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        called(waiting)
    assert "reward function waiting has been at work" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "watch slow" and thread.is_alive()]
