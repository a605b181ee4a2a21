"""The GPUs of this machine: known by their whole name, with the memory and the number that CUDA gives."""

from types import SimpleNamespace

import pytest
import torch

from meshift.planner.hardware import KNOWN
from meshift.runtime import this_hardware
from meshift.runtime.this_hardware import hardware_of_run

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "gib", "rates", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100", True),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100", True),
        ("NVIDIA H200", 139.8, "h200", True),
        ("NVIDIA B200", 178.4, "b200", True),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100", False),
        ("NVIDIA H100 PCIe", 79.1, "h100", False),
        ("NVIDIA GH200 480GB", 94.5, "a100", False),
        ("NVIDIA GeForce RTX 4090", 23.6, "a100", False),
        ("NVIDIA H20", 95.1, "a100", False),
    ],
)
def test_a_gpu_is_given_another_ones_memory(monkeypatch, name, gib, rates, known):
    told = SimpleNamespace(name=name, total_memory=int(gib * GIB))
    monkeypatch.setattr(this_hardware, "device_for_run", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found, is_known = hardware_of_run(None, "bfloat16")
    assert (found.memory, found.per_host, is_known) == (told.total_memory, 2, known)
    assert found.flops == KNOWN[rates].flops
    assert found.name == (rates if known else f"{name} at the rates of {rates}, which are assumed")


def test_fp32_is_planned_at_peaks_that_only_tf32_has():
    assert not torch.backends.cuda.matmul.allow_tf32
    assert {key: one.flops["float32"] for key, one in KNOWN.items()} == {
        "a100": 19.5e12,
        "h100": 67e12,
        "h200": 67e12,
        "b200": 75e12,
    }
