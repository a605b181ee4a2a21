"""What is known of processes is judged right, whoever started them: a gang that only pretends, and a clock."""

import pytest

from meshift.errors import LostWorkerError, WorkerError
from meshift.runtime.launch.gang import Ending, state_of
from meshift.runtime.launch.watch import Limits, Watch

STACKS = """Thread 0x1 (most recent call first):
  File "/x/meshift/runtime/launch/member.py", line 78 in beat

Current thread 0x2 (most recent call first):
  File "/x/python/threading.py", line 9 in hold
  File "/x/meshift/step.py", line NUMBER in wait
"""


class PretendedGang:
    def __init__(self, size, endings=None):
        self.size, self.endings = size, endings or {}

    def __len__(self):
        return self.size

    def ending(self, rank):
        return self.endings.get(rank)

    def look(self):
        return [("sleeping", STACKS.replace("NUMBER", str(rank))) for rank in range(self.size)]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def watch_of(gang, **limits):
    clock = Clock()
    return Watch(gang, Limits(**{"death_s": 0.1, **limits}), clock), clock


def go_on(watch, clock, seconds, speaking=()):
    for _ in range(seconds):
        clock.now += 1
        for rank in speaking:
            watch.heard(rank)
            watch.beat(rank, [1, 2, "rollout"])
        watch.check()


def test_a_silent_process_is_named_with_its_state_and_line():
    watch, clock = watch_of(PretendedGang(2), heartbeat_s=10)
    watch.beat(1, [1, 2, "rollout"])
    with pytest.raises(
        LostWorkerError,
        match=r"process 1 .*11 s \(sleeping; in step 3, call rollout, in wait at meshift/step.py:1",
    ):
        go_on(watch, clock, 12, speaking=[0])


def test_silence_would_be_counted_while_nobody_listened():
    watch, clock = watch_of(PretendedGang(2), heartbeat_s=10, hang_s=20)
    clock.now += 1000
    watch.check()
    with pytest.raises(LostWorkerError):
        go_on(watch, clock, 12)


def test_processes_that_stand_still_hang_though_they_speak():
    watch, clock = watch_of(PretendedGang(2), hang_s=20)
    with pytest.raises(LostWorkerError, match="no process of the run has gone on for 20 s") as caught:
        go_on(watch, clock, 30, speaking=[0, 1])
    assert "process 0: sleeping; in step 3, call rollout" in caught.value.report


KILLED, FAILED = Ending(kind="killed", how="was lost with its node b"), Ending(kind="failed", how="ended badly")
DESERTED = Ending(kind="deserted", how="could not reach another")


@pytest.mark.parametrize(
    ("endings", "kind", "sentence"),
    [
        ({0: DESERTED, 1: DESERTED, 3: KILLED}, LostWorkerError, "process 3 of the run was lost with its node b"),
        ({0: DESERTED, 2: FAILED}, WorkerError, "process 2 of the run ended badly, and the others"),
        ({0: DESERTED}, LostWorkerError, r"process 0 of the run could not reach another \(before .*; Broken\)"),
        ({}, LostWorkerError, r"process 0 of the run cannot go on \(before its first call; Broken\)"),
    ],
)
def test_the_cause_of_a_death_is_told_before_its_victims(endings, kind, sentence):
    watch, _ = watch_of(PretendedGang(4, endings))
    error = watch.death_of(0, "Broken")
    assert type(error) is kind
    with pytest.raises(kind, match=sentence):
        raise error


def test_a_process_that_is_no_more_is_gone():
    assert state_of(2**22 - 1) == "gone"
    assert state_of(1) in ("sleeping", "running")
