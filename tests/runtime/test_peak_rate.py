"""The peak is measured once: all steps of a run are held against the same."""

import math

import pytest
import torch
from tiny_rl import tiny_model

from meshift.config.sections import TrainableConfig
from meshift.runtime import peak_rate as subject
from meshift.runtime.role import LocalRole

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def forget():
    """What other tests measured, and these."""
    subject.peak_rate.cache_clear()
    yield
    subject.peak_rate.cache_clear()


def test_a_later_measurement_would_move_what_steps_are_held_against(monkeypatch):
    found = [3e9, 5e9, 2e9]
    monkeypatch.setattr(subject, "_measured", lambda device, dtype: found.pop(0))
    roles = [LocalRole(name, tiny_model(), TrainableConfig()) for name in ("actor", "critic")]
    assert [role.peak_flops for role in (*roles, *roles)] == [3e9] * 4
    assert subject.peak_rate(CPU, torch.bfloat16) == 5e9, (
        "another type's peak is its own, or that of fp32 if higher"
    )


def test_a_measurement_is_that_of_the_fastest_product(monkeypatch):
    seconds = [0.03, 0.01, 0.02, 0.03, 0.03, 0.2]
    clock = iter([time for i, taken in enumerate(seconds) for time in (10.0 * i, 10.0 * i + taken)])
    monkeypatch.setattr(subject.time, "perf_counter", lambda: next(clock))
    assert math.isclose(subject._measured(CPU, torch.float32), 2 * subject.SIZE**3 / 0.01)
    assert next(clock, None) is None, "until a third of a second is over"


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
    ],
)
def test_cards_of_one_chip_and_less_power_would_have_its_peak(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert subject.peak_rate(torch.device("cuda", 0), torch.bfloat16) == teraflops * 1e12
