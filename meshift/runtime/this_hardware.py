"""The hardware that a run is on, for the planner: as profiled, or of a known GPU, or guessed.

It knows nothing of plans.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import MappingProxyType

import torch

from meshift.planner.hardware import Hardware, find_hardware, like_named
from meshift.planner.memory import Machine
from meshift.runtime.machine import machine_memory
from meshift.runtime.models import device_for_run, fast_bfloat16
from meshift.runtime.observer import Observer
from meshift.runtime.profiling.profile import named_hardware, profile_path

CPU = "cpu"
PROCESSOR_FLOPS = MappingProxyType({"float32": 4e10, "bfloat16": 8e10})
"""A second, of one core: a guess of the right order for servers of these years."""
PROCESSOR_BYTES = 8e9
"""Read a second by one core: a guess."""
PROCESS_BYTES = 4e8
"""Of a process before it has a model: a guess, until it is measured in the process itself."""


def num_devices() -> int:
    """GPUs where there are some, else the processors that this process may use."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def turns_taken(num_processes: int) -> str | None:
    """A sentence where so many processes of this machine share its processors or GPUs; None: each has its own."""
    count = num_devices()
    if num_processes <= count:
        return None
    what = "GPU" if torch.cuda.is_available() else "processor"
    return f"{count} {what}{'s' * (count != 1)} here for {num_processes} processes, which take turns"


def hardware_of_run(
    name: str | None, dtype: str, *, measure: bool = False, observer: Observer | None = None
) -> tuple[Hardware, bool]:
    """The hardware of `launch.hardware` (None: of this machine), and whether its numbers are known or measured.

    A CPU without a profile is guessed, or with `measure` measured in a short probe; so is an unknown GPU. Raises
    `ConfigError` for a name that is none.
    """
    if name is not None and name.lower() != CPU:
        return find_hardware(name), True
    device = device_for_run()
    if device.type == "cuda" and name is None:
        return gpu_here(device)
    if measure or profile_path((dtype,)).is_file():
        return named_hardware(CPU, (dtype,), observer), True
    return guessed_cpu(), False


def gpu_here(device: torch.device) -> tuple[Hardware, bool]:
    """This machine's GPUs, with their number and memory, at the rates of a known kind; whether they are of it."""
    told = torch.cuda.get_device_properties(device)
    alike, is_known = like_named(told.name, float(told.total_memory))
    name = alike.name if is_known else f"{told.name} at the rates of {alike.name}, which are assumed"
    here = replace(alike, name=name, memory=float(told.total_memory), per_host=torch.cuda.device_count())
    return here, is_known


def guessed_cpu() -> Hardware:
    """This machine's processors, whose number and memory are known, and whose speed is not."""
    cores, memory = num_devices(), machine_memory()
    return Hardware(
        name="this CPU, not profiled",
        memory=memory.total / cores,
        flops=PROCESSOR_FLOPS,
        memory_rate=PROCESSOR_BYTES,
        near_rate=2e9,
        far_rate=1e9,
        host_rate=PROCESSOR_BYTES,
        per_host=max(cores, 8),
        compute_share=1.0,
        memory_share=1.0,
        link_share=1.0,
        near_delay=2e-4,
        near_hop=2e-4,
        far_delay=1e-3,
        far_hop=1e-3,
        layer_delay=2e-4,
        reserve=min(PROCESS_BYTES, memory.total / cores / 2),
        machine=Machine(packs=True, kernels=fast_bfloat16()),
    )
