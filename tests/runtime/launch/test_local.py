"""A gang ends as one: with a result, or with the first error, and never with a process left behind."""

import math
import os
import signal
import time

import pytest
import torch

from meshift.config.runs import SFTRunConfig
from meshift.errors import ConfigError, DataError, LostWorkerError, WorkerError
from meshift.runtime.launch.local import gpus_for, run_gang
from meshift.runtime.launch.restarts import run_with_restarts
from meshift.runtime.launch.watch import Limits
from meshift.runtime.observer import SilentObserver


class Listener(SilentObserver):
    def __init__(self):
        self.messages, self.steps, self.counts = [], [], []

    def on_message(self, text):
        self.messages.append(text)

    def on_count(self, what, done, total):
        self.counts.append((what, done, total))

    def on_step(self, step, metrics):
        self.steps.append((step, metrics))


def test_all_are_heard_and_the_first_one_answers():
    listener = Listener()
    assert run_gang(3, "gang_members:add_up", "2", listener) == [3, 9.0]
    assert sorted(listener.messages) == ["here is 0", "here is 1", "here is 2"]
    assert listener.counts == [("letters", 1, 1)], "of what all do, the first one tells how far it is"
    assert len(listener.steps) == 1
    assert listener.steps[0][0] == 0
    assert math.isnan(listener.steps[0][1]["loss"])


@pytest.mark.parametrize(("found", "gpus"), [(0, [None] * 3), (3, [0, 1, 2]), (8, [0, 1, 2])])
def test_each_process_has_a_gpu_of_its_own_or_none_has_one(found, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    assert gpus_for(3) == gpus


def test_more_devices_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"^`plan` has 3 devices, but this machine has 2 GPUs; plan for as many"):
        gpus_for(3)


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


def test_a_victim_of_a_death_would_be_taken_for_its_cause():
    for _ in range(3):
        with pytest.raises(LostWorkerError, match="process 2 of the run was killed by SIGKILL"):
            run_gang(4, "gang_members:lose_a_peer", "", SilentObserver())


def test_a_stopped_process_would_be_waited_for():
    limits = Limits(heartbeat_s=3.0)
    with pytest.raises(
        LostWorkerError, match=r"process 1 .* not been heard for \d+ s \(stopped; in step 3, call rol"
    ):
        run_gang(2, "gang_members:stop_itself", "", SilentObserver(), limits)


def test_processes_that_wait_for_each_other_would_do_so_for_ever():
    limits = Limits(hang_s=2.5)
    with pytest.raises(LostWorkerError, match=r"no process of the run has gone on for 2 s") as caught:
        run_gang(2, "gang_members:wait_for_ever", "", SilentObserver(), limits)
    report = caught.value.report
    assert "process 0" in report
    assert "in step 5, call train_critic" in report
    assert "in step 5, call train_actor" in report
    assert report.count("in wait_for_ever") == 2, "both stacks are in it"


def test_a_process_that_gets_on_would_be_taken_to_hang():
    assert run_gang(2, "gang_members:work_slowly", "", SilentObserver(), Limits(hang_s=2.0)) == "done"


def test_the_error_of_one_would_be_hidden_by_those_who_lost_it():
    class Busy(SilentObserver):
        def on_message(self, text):
            time.sleep(0.7)

    with pytest.raises(DataError, match=r"rows\.jsonl:3 is no row"):
        run_gang(2, "gang_members:refuse_late", "", Busy())


def test_a_lost_server_would_not_be_a_lost_process():
    with pytest.raises(LostWorkerError, match="was killed, or the process that starts the others was"):
        run_gang(2, "gang_members:kill_the_server", "", SilentObserver())
    assert run_gang(2, "gang_members:add_up", "2", SilentObserver()) == [2, 5.0]  # another one serves


def test_sigterm_would_not_reach_the_first_process():
    class Sender(SilentObserver):
        def on_message(self, text):
            os.kill(os.getpid(), signal.SIGTERM)

    assert run_gang(2, "gang_members:wait_for_term", "", Sender()) == [signal.SIGTERM]


def lost(report=None):
    return LostWorkerError("process 1 of the run was killed", report=report)


class Attempts:
    """Runs that are lost so many times, after they began or before."""

    def __init__(self, num_lost, *, began=True, error=None):
        self.left, self.began, self.error, self.resumed = num_lost, began, error or lost(), []

    def __call__(self, config, observer):
        self.resumed.append(config.resume)
        if self.began:
            observer.on_start(3, "a run")
        if self.left:
            self.left -= 1
            raise self.error
        return "done"


@pytest.fixture
def config(tmp_path):
    return SFTRunConfig(
        output_dir=str(tmp_path), model={"model_name_or_path": "m"}, data={"dataset_name": "d"}, max_steps=3
    )


def test_a_lost_run_would_not_go_on_from_its_checkpoint(config):
    attempts, listener = Attempts(2), Listener()
    assert run_with_restarts(config, 3, attempts, listener) == "done"
    assert attempts.resumed == [False, True, True]
    assert [text.rpartition(";")[2] for text in listener.messages] == [
        f" starting again ({number} of at most 3 restarts)" for number in (1, 2)
    ]


def test_a_run_that_never_began_would_go_on_from_another_runs_checkpoint(config):
    attempts = Attempts(1, began=False)
    assert run_with_restarts(config, 3, attempts, SilentObserver()) == "done"
    assert attempts.resumed == [False, False]


def test_restarts_would_never_end(config):
    attempts = Attempts(99)
    with pytest.raises(LostWorkerError, match="was killed; the run has ended after 2 restarts"):
        run_with_restarts(config, 2, attempts, SilentObserver())
    assert len(attempts.resumed) == 3


def test_other_errors_would_be_tried_again(config):
    attempts = Attempts(1, error=DataError("rows.jsonl:3 is no row"))
    with pytest.raises(DataError):
        run_with_restarts(config, 3, attempts, SilentObserver())
    assert len(attempts.resumed) == 1


def test_the_report_of_a_hang_would_be_lost(config, tmp_path):
    with pytest.raises(LostWorkerError, match=r"hang_report\.txt has their stacks\); the run has ended$"):
        run_with_restarts(config, 0, Attempts(1, error=lost("rank 0: ...")), SilentObserver())
    assert (tmp_path / "hang_report.txt").read_text() == "rank 0: ..."
