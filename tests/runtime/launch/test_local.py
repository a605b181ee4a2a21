"""A gang ends as one: with a result, or with the first error, and never with a process left behind."""

import math
import os

import pytest

from meshift.errors import DataError, WorkerError
from meshift.runtime.launch.local import run_gang
from meshift.runtime.observer import SilentObserver


class Listener(SilentObserver):
    def __init__(self):
        self.messages, self.steps = [], []

    def on_message(self, text):
        self.messages.append(text)

    def on_step(self, step, metrics):
        self.steps.append((step, metrics))


def test_all_are_heard_and_the_first_one_answers():
    listener = Listener()
    assert run_gang(3, "gang_members:add_up", "2", listener) == [3, 9.0]
    assert sorted(listener.messages) == ["here is 0", "here is 1", "here is 2"]
    assert len(listener.steps) == 1
    assert listener.steps[0][0] == 0
    assert math.isnan(listener.steps[0][1]["loss"])


def test_an_error_of_one_ends_all_as_what_it_is():
    with pytest.raises(DataError, match=r"^rows\.jsonl:3 is no row$"):
        run_gang(2, "gang_members:refuse", "", SilentObserver())


def test_an_accident_names_the_process():
    with pytest.raises(WorkerError, match="process 1 of the run ended with code 1"):
        run_gang(2, "gang_members:crash", "", SilentObserver())


def test_a_death_is_seen_at_once_and_leaves_nobody():
    listener = Listener()
    with pytest.raises(WorkerError, match="process 1 of the run was killed by SIGKILL"):
        run_gang(2, "gang_members:die", "", listener)
    assert len(listener.messages) == 2
    for pid in listener.messages:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
