"""The steps that are left, against completions whose lengths are known."""

import numpy as np
import pytest

from meshift.evaluation.steps_left import StepsLeft


def drawn(lengths, num_slots, limit):
    """For each step of completing these: how many are finished, and the steps expected to be left after it."""
    left = StepsLeft(num_requests=len(lengths), num_slots=num_slots, max_new_tokens=limit)
    waiting, live, finished = list(lengths), [], 0
    while waiting or live:
        while waiting and len(live) < num_slots:
            live.append([0, waiting.pop(0)])
        for one in live:
            one[0] += 1
        ended = [whole for age, whole in live if age == whole]
        live = [one for one in live if one[0] < one[1]]
        left.add(ended)
        finished += len(ended)
        yield finished, left([age for age, _ in live])


def test_what_no_finished_one_tells_of_is_taken_to_reach_the_limit():
    left = StepsLeft(num_requests=4, num_slots=4, max_new_tokens=100)
    assert left([1, 1, 1, 1]) == 99
    left.add([10, 20, 30])
    assert left([31]) == 69
    assert left([90]) == 10
    left.add([100])
    assert left([]) == 0


def test_the_last_one_counts_down():
    told = [steps for finished, steps in drawn([3, 5, 40, 4], 4, 60) if finished == 3]
    assert told == list(range(55, 55 - len(told), -1)), "one step less after every step"


def test_one_that_grows_on_has_what_those_took_that_were_as_long():
    """Of the four that had over 10 tokens, two ended at 12 and two at 20."""
    left = StepsLeft(num_requests=7, num_slots=1, max_new_tokens=1000)
    left.add([5, 5, 12, 12, 20, 20])
    assert left([10]) == pytest.approx((12 - 10) / 2 + (20 - 10) / 2)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_near_the_steps_that_are_then_taken(seed):
    limit = 256
    lengths = np.random.default_rng(seed).geometric(1 / 60, 600).clip(max=limit).tolist()
    told = list(drawn(lengths, 32, limit))
    truth = np.arange(len(told) - 1, -1, -1)
    errors = np.abs(np.array([steps for _, steps in told]) - truth) / len(told)
    assert errors[len(told) // 5 :].max() < 0.15
    by_count = [step / max(finished, 1) * (600 - finished) for step, (finished, _) in enumerate(told, 1)]
    tail = slice(-len(told) // 4, None)
    wrong = np.abs(np.array(by_count) - truth) / len(told)
    assert errors[tail].mean() < wrong[tail].mean() / 2, "the finished alone say little of the last ones"
