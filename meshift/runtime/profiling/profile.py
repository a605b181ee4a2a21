"""A profile of this machine's device: all measurements, put together as the planner's `Hardware`.

It knows nothing of plans.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from meshift.cache_folder import cache_root
from meshift.counted import counted
from meshift.errors import ConfigError
from meshift.kernels.cpu import kernels
from meshift.models.config import DecoderConfig
from meshift.planner.hardware import Hardware, as_values, find_hardware, from_values, like_named
from meshift.planner.memory import Machine
from meshift.planner.profile import Message, Product, Profile
from meshift.runtime.launch.local import run_gang
from meshift.runtime.machine import machine_memory
from meshift.runtime.models import device_for_run, fast_bfloat16
from meshift.runtime.observer import Observer, SilentObserver
from meshift.runtime.profiling import gang
from meshift.runtime.profiling.models import QUICK, THOROUGH, Effort, made, narrowed, stand_in
from meshift.runtime.profiling.products import Work, products, speeds

CALL_SECONDS = 1e-3
RESERVE = 6e8
"""Bytes of a process on a CPU beside models: interpreter, libraries, threads (measured with an empty run)."""
FAR_RATE = 1.25e8
"""Of a network that was not measured: 1 Gb/s."""
LOOK_SECONDS = 0.4
NUM_PROCESSES = 4
PER_HOST = 8


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be measured: a model's layers (None: a stand-in's), types, processes beside each other."""

    config: DecoderConfig | None = None
    model: str = ""
    dtypes: tuple[str, ...] = ("float32",)
    num_processes: int = NUM_PROCESSES
    effort: Effort = THOROUGH


def measure(asked: Asked, observer: Observer | None = None) -> Hardware:
    """Everything, on the device that runs would use; a minute or two."""
    observer = observer or SilentObserver()
    device = device_for_run()
    config = asked.config or stand_in()
    threads = _threads(asked.num_processes) if device.type == "cpu" else (torch.get_num_threads(),)
    before = torch.get_num_threads()
    table: dict[str, dict[str, float]] = {}
    others = [_others()]
    parts = [
        (dtype, count, asked.effort.cuts if count == min(threads) else (1,))
        for dtype in asked.dtypes
        for count in threads
    ]

    def alone() -> Iterator[Product]:
        for dtype, count, cuts in parts:
            torch.set_num_threads(count)
            observer.on_message(f"{dtype}, {count} thread{'s' * (count > 1)}: layers, head, optimizer, cache")
            for cut in cuts:
                model = made(narrowed(config, cut, asked.effort.layers), getattr(torch, dtype), device)
                work = Work(model=model, effort=asked.effort)
                yield from products(work)
                if cut == 1:
                    for kind, value in speeds(work).items():
                        table.setdefault(f"{kind}/{dtype}", {})[str(count)] = value
            others.append(_others())

    total = asked.effort.num_products * sum(len(cuts) for _, _, cuts in parts)
    found = list(counted(alone(), "measurements", lambda: total))
    torch.set_num_threads(before)
    shared = _beside_each_other(asked, config, observer) if device.type == "cpu" else {}
    profile = Profile(
        products=tuple(found),
        messages=tuple(Message(**one) for one in shared.get("messages", ())),
        speeds=table,
        crowding=shared.get("crowding", {}),
        cores=(os.cpu_count() or 1) if device.type == "cpu" else 0,
        call=CALL_SECONDS if device.type == "cpu" else 0.0,
        model=asked.model,
        others=max([*others, _others()]),
    )
    return described(profile, device)


def _threads(num_processes: int) -> tuple[int, ...]:
    """That processes have, as many as there may be: the launcher shares processors out."""
    cores = os.cpu_count() or 1
    return tuple(sorted({max(1, cores // n) for n in range(1, num_processes + 1)}))


def _others() -> float:
    """Processors that work of others takes while this process waits for a moment; 0 where Linux does not say."""
    try:
        before = _busy_seconds()
        started = time.perf_counter()
        time.sleep(LOOK_SECONDS)
        return max(0.0, _busy_seconds() - before) / (time.perf_counter() - started)
    except (OSError, ValueError, IndexError):
        return 0.0


def _busy_seconds() -> float:
    """Of all processors together since the start (`proc(5)`: all columns of /proc/stat but idle and waiting)."""
    ticks = [int(text) for text in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _beside_each_other(asked: Asked, config: DecoderConfig, observer: Observer) -> dict[str, Any]:
    if asked.num_processes < 2:
        return {}
    told = gang.Asked(config=dict(config.hf), dtype=asked.dtypes[0], seconds=2 * asked.effort.seconds)
    found: dict[str, Any] = run_gang(asked.num_processes, gang.ENTRY, told.written(), observer)
    return found


def described(profile: Profile, device: torch.device) -> Hardware:
    """The device that was measured, with its profile. A GPU that is known keeps what was not measured."""
    rates = {
        dtype: max(one.rate for one in profile.products if one.dtype == dtype)
        for dtype in {one.dtype for one in profile.products}
    }
    copied = max(v for kind, found in profile.speeds.items() if kind.startswith("copy") for v in found.values())
    if device.type == "cuda":
        return _gpu(profile, rates, 2 * copied, device)
    sums = [one for one in profile.messages if one.kind == "send"] or [
        Message(kind="send", members=2, among=2, num_bytes=copied, seconds=1.0)
    ]
    most, least = max(sums, key=lambda one: one.num_bytes), min(sums, key=lambda one: one.num_bytes)
    return Hardware(
        name="cpu",
        memory=float(machine_memory().total),
        flops={"float32": 0.0, "bfloat16": 0.0, **rates},
        memory_rate=2 * copied,
        near_rate=most.num_bytes / most.seconds,
        far_rate=FAR_RATE,
        host_rate=copied,
        per_host=PER_HOST,
        compute_share=1.0,
        memory_share=1.0,
        link_share=1.0,
        near_delay=least.seconds,
        reserve=RESERVE,
        machine=Machine(packs=True, kernels=kernels() is not None and fast_bfloat16()),
        profile=profile,
    )


def _gpu(profile: Profile, rates: dict[str, float], memory_rate: float, device: torch.device) -> Hardware:
    name = torch.cuda.get_device_name(device)
    memory = float(torch.cuda.get_device_properties(device).total_memory)
    alike, _ = like_named(name, memory)
    values = as_values(alike) | {
        "name": name,
        "memory": memory,
        "per_host": torch.cuda.device_count(),
        "flops": {**alike.flops, **rates},
        "memory_rate": memory_rate,
        "memory_share": 1.0,
    }
    return from_values({**values, "profile": profile.values()})


def write(hardware: Hardware, path: Path) -> None:
    """As JSON. Raises `ConfigError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(as_values(hardware), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def named_hardware(name: str, dtypes: Sequence[str] = ("float32",), observer: Observer | None = None) -> Hardware:
    """As `find_hardware`; and `cpu`: this machine, measured in a short probe that is kept in the cache.

    One that was measured beside other work is used, with a word to `observer`, and not kept.
    """
    if name.lower() != "cpu":
        return find_hardware(name)
    path = profile_path(dtypes)
    if path.is_file():
        return find_hardware(str(path))
    observer = observer or SilentObserver()
    observer.on_message("this machine is measured first, once: about a minute")
    hardware = measure(Asked(dtypes=tuple(dtypes), effort=QUICK), observer)
    profile = hardware.profile
    if profile is not None and profile.is_disturbed:
        observer.on_message(
            f"other work took {profile.others:.1f} processors meanwhile: what is predicted will be too long, "
            "and the profile is not kept; plan again when that has ended"
        )
    else:
        write(hardware, path)
    return hardware


def profile_path(dtypes: Sequence[str]) -> Path:
    """Where the probe of this machine is kept."""
    return cache_root() / "profiles" / f"cpu-{_key(dtypes)}.json"


def _key(dtypes: Sequence[str]) -> str:
    """Of all that what was measured depends on: processors, torch, types."""
    model = next((line for line in _cpu_lines() if line.startswith("model name")), platform.processor())
    facts = [platform.machine(), model, str(os.cpu_count()), torch.__version__, *sorted(dtypes)]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
