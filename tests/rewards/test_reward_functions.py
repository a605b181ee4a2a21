"""Reward functions as users of TRL write them, plain and async, several with weights."""

import asyncio
import gc

import pytest
import torch
from reward_batches import host_call, rollout, score

from meshift.errors import RewardError
from meshift.rewards.functions import WeightedFunction


def test_a_function_is_given_texts_token_ids_and_every_column():
    seen = {}

    def judge(prompts, completions, completion_ids, **kwargs):
        assert (kwargs.pop("trainer_state").global_step, bool(kwargs.pop("log_extra"))) == (0, True)
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        return [1.0, 2.0]

    batch = rollout(answer=["x", "y"], level=[1, 2], prompt=["A B", "C"])
    assert score((judge, 1.0), batch=batch)[0] == [1.0, 2.0]
    assert seen == {
        "prompts": ["A B", "C"],  # the row's own text, not what its tokens decode to
        "completions": ["de", "fga"],
        "completion_ids": [[3, 4], [5, 6, 0]],
        "answer": ["x", "y"],
        "level": [1, 2],
        "log_metric": seen["log_metric"],
    }


def test_prompts_are_decoded_where_no_column_holds_them():
    def judge(prompts, completions):
        assert prompts == ["ab", "c"]
        return [len(c) for c in completions]

    assert score((judge, 1.0))[0] == [2.0, 3.0]


def test_a_function_may_name_only_what_it_needs():
    def judge(completion_ids, answer):
        return [float(len(ids) == a) for ids, a in zip(completion_ids, answer, strict=True)]

    batch = rollout(answer=[2, 9], other=["p", "q"])
    assert score((judge, 1.0), batch=batch)[0] == [1.0, 0.0]


def test_async_functions_are_awaited():
    async def judge(completions, **kwargs):
        await asyncio.sleep(0)
        return [0.5] * len(completions)

    assert score((judge, 1.0))[0] == [0.5, 0.5]


def meeting():
    """Two functions that end only if both have begun."""
    begun = []

    async def one(completions):
        begun.append("one")
        while len(begun) < 2:
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    async def two(completions):
        begun.append("two")
        while len(begun) < 2:
            await asyncio.sleep(0.001)
        return [2.0] * len(completions)

    async def waiting(completions):
        return await asyncio.wait_for(one(completions), 5)

    return waiting, two


def test_async_functions_wait_at_the_same_time():
    one, two = meeting()
    assert score((one, 1.0), (lambda completions: [7.0, 8.0], 1.0), (two, 10.0))[0] == [28.0, 29.0]


def test_async_functions_work_where_an_event_loop_already_runs():
    one, two = meeting()

    async def notebook():
        return score((one, 1.0), (two, 10.0))[0]

    assert asyncio.run(notebook()) == [21.0, 21.0]


def test_a_plain_function_may_run_an_event_loop_of_its_own_beside_async_ones():
    async def later(completions):
        return [1.0] * len(completions)

    def plain(completions):
        return asyncio.run(later(completions))

    assert score((later, 1.0), (plain, 1.0))[0] == [2.0, 2.0]


@pytest.mark.filterwarnings("error")
def test_an_async_function_beside_one_that_raises_is_named_rightly_and_leaves_no_open_coroutine():
    async def later(completions):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    def broken(completions):
        raise KeyError("gone")

    async def broken_later(completions):
        raise KeyError("gone")

    for bad in (broken, broken_later):
        with pytest.raises(RewardError, match=f"reward function {bad.__name__} raised KeyError"):
            score((later, 1.0), (bad, 1.0))
        gc.collect()


def test_prompts_of_messages_come_with_completions_of_messages_as_in_trl():
    chats = [[{"role": "user", "content": "A B"}], [{"role": "system", "content": "C"}]]

    def judge(prompts, completions):
        assert prompts == chats
        assert completions == [[{"role": "assistant", "content": text}] for text in ("de", "fga")]
        return [float(len(c[0]["content"])) for c in completions]

    assert score((judge, 1.0), batch=rollout(prompt=chats))[0] == [2.0, 3.0]


def test_several_functions_add_up_by_weight_and_none_adds_nothing():
    def length(completions):
        return [len(c) for c in completions]

    def unsure(completions):
        return [None, 4.0]

    def silent(completions):
        return [None, None]

    scores, metrics = score((length, 0.5), (unsure, -1.0), (silent, 10.0))
    assert scores == [1.0, 1.5 - 4.0]
    assert metrics["reward/length"] == 2.5
    assert metrics["reward/unsure"] == 4.0, "a mean over what was judged"
    assert "reward/silent" not in metrics


@pytest.mark.parametrize("result", [torch.tensor([1.0, 2.0]), (1, 2), [True, 2.0], iter([1.0, 2.0])])
def test_whatever_walks_like_a_list_of_numbers_is_taken(result):
    def judge(completions):
        return result

    assert score((judge, 1.0))[0] == [1.0, 2.0]


def test_the_trainer_state_counts_finished_steps_even_after_a_resume():
    def judge(completions, trainer_state):
        return [float(trainer_state.global_step)] * len(completions)

    assert score((judge, 1.0), batch=rollout(first=6))[0] == [3.0, 3.0], "two sequences a step"


def test_what_a_function_logs_becomes_metrics():
    async def judge(completions, log_extra, log_metric, **columns):
        log_extra("num_letters", [len(c) for c in completions])
        log_extra("seen", list(completions))
        log_metric("share", torch.tensor(0.25))
        log_metric("share", 0.75)
        return [0.0 for _ in completions]

    assert score((judge, 1.0))[1] == {
        "reward/judge": 0.0,
        "reward/judge/num_letters": 2.5,
        "reward/judge/share": 0.5,
    }


def test_async_functions_may_keep_what_belongs_to_an_event_loop_between_steps():
    """A lock that is waited for binds to its loop; another loop in the next step would be refused."""
    from reward_batches import host_call

    from meshift.rewards.functions import WeightedFunction

    lock = asyncio.Semaphore(1)

    async def judge(completions):
        async def one(text):
            async with lock:
                await asyncio.sleep(0)
                return float(len(text))

        return await asyncio.gather(*map(one, completions))

    call = host_call([WeightedFunction(name="judge", function=judge, weight=1.0)], rollout())
    for _ in range(2):
        assert call(rollout()).batch["function_scores"].values.tolist() == [2.0, 3.0]


def test_a_plain_function_runs_in_the_main_thread_where_alarms_work():
    import threading

    def judge(completions):
        return [float(threading.current_thread() is threading.main_thread())] * len(completions)

    async def later(completions):
        return [0.0] * len(completions)

    assert score((later, 1.0), (judge, 1.0))[0] == [1.0, 1.0]


def test_the_seconds_of_each_function_are_a_metric():
    import time

    def slow(completions):
        time.sleep(0.05)
        return [0.0] * len(completions)

    def fast(completions):
        return [0.0] * len(completions)

    batch = rollout()
    functions = [WeightedFunction(name=f.__name__, function=f, weight=1.0) for f in (slow, fast)]
    metrics = host_call(functions, batch)(batch).metrics
    assert 0.05 <= metrics["perf/time_per_reward/slow"] < 5
    assert 0 <= metrics["perf/time_per_reward/fast"] < 0.05
