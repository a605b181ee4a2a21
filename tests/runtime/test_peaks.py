"""The peak of each call is its own, also where an earlier one was higher."""

import mmap

import pytest
import torch

from meshift.runtime import peaks
from meshift.runtime.peaks import PeakMeter

MEGABYTES = 200


def use_memory():
    """Fresh pages: an allocator may have some left from other tests."""
    with mmap.mmap(-1, MEGABYTES * 10**6) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1


@pytest.mark.skipif(not peaks.RESET.exists(), reason="peaks are measured by /proc")
def test_a_call_has_its_own_peak():
    meter = PeakMeter(torch.device("cpu"))
    meter.begin("small")
    meter.begin("large")
    use_memory()
    meter.begin("after")
    meter.begin("small")
    found = meter.end()
    assert set(found) == {f"perf/peak_memory_gb/{name}" for name in ("small", "large", "after")}
    assert found["perf/peak_memory_gb/large"] > found["perf/peak_memory_gb/small"] + 0.8 * MEGABYTES / 1000
    assert found["perf/peak_memory_gb/after"] < found["perf/peak_memory_gb/large"] - 0.5 * MEGABYTES / 1000
    assert meter.end() == {}


def test_nothing_is_said_where_nothing_can_be_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(peaks, "RESET", tmp_path / "none" / "clear_refs")
    meter = PeakMeter(torch.device("cpu"))
    meter.begin("call")
    assert meter.end() == {}
