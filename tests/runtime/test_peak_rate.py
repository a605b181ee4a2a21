"""The peak is what was measured at best, so that a run's use of the device stays below one."""

import math
from types import SimpleNamespace

import pytest
import torch

from meshift.runtime import peak_rate as subject
from meshift.runtime.peak_rate import PeakRate

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """`clock.now` is the time; each of `clock.found` is what a measurement of a second finds."""
    clock = SimpleNamespace(now=0.0, found=[3e9, 5e9, 2e9])

    def measured(device, dtype):
        clock.now += 1.0
        return clock.found.pop(0)

    monkeypatch.setattr(subject.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(subject, "_measured", measured)
    return clock


def test_a_slow_measurement_does_not_count_after_a_fast_one(clock):
    rate, found = PeakRate(), []
    for _ in range(3):
        found.append(rate(CPU, torch.float32))
        clock.now += 1000.0
    assert found == [3e9, 5e9, 5e9]
    assert not clock.found


def test_short_steps_would_be_spent_on_measuring(clock):
    """Of ten steps of 20 seconds: a hundredth of the time is a second after 100, and two after 200."""
    rate, left = PeakRate(), []
    for _ in range(10):
        rate(CPU, torch.float32)
        left.append(len(clock.found))
        clock.now += 20.0
    assert left == [2, 2, 2, 2, 2, 1, 1, 1, 1, 1]


def test_a_measurement_is_that_of_the_fastest_product(monkeypatch):
    seconds = [0.3, 0.1, 0.2, 0.3, 0.3]
    assert len(seconds) == subject.NUM_PRODUCTS
    clock = iter([time for i, taken in enumerate(seconds) for time in (10.0 * i, 10.0 * i + taken)])
    monkeypatch.setattr(subject.time, "perf_counter", lambda: next(clock))
    assert math.isclose(subject._measured(CPU, torch.float32), 2 * subject.SIZE**3 / 0.1)
