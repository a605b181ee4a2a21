"""What a cluster's devices and links can do, as numbers: descriptions of usual GPUs, and of machines as measured.

It knows nothing of models or layouts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from math import ceil, isfinite, log2
from pathlib import Path
from types import MappingProxyType
from typing import Any

from meshift.errors import ConfigError
from meshift.planner.memory import Machine
from meshift.planner.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device, `per_host` of which stand together. Rates are of a device, one way, in units a second.

    `flops` by compute type and `memory_rate` (bytes) are peaks; `compute_share` and `memory_share` say what part
    of them large matrix products and long reads reach. `near_rate` is the link within a host, `far_rate` its
    part of the network between hosts, `host_rate` the way to the host's memory; `link_share` of them is reached.
    `near_delay` and `far_delay` are seconds for a message, and `near_hop`, `far_hop` for each doubling of a group
    that sends one together; `layer_delay` is for starting one layer's operations. `reserve`: bytes that the
    runtime, libraries, buffers of NCCL's groups and fragments take. What a `profile` measured stands for all of
    these but memory and the network between hosts; `processes` are those of a plan on a host, which share its
    processors where it has no devices (`Profile.cores`).
    """

    name: str
    memory: float
    flops: Mapping[str, float]
    memory_rate: float
    near_rate: float
    far_rate: float
    host_rate: float
    per_host: int = 8
    compute_share: float = 0.5
    memory_share: float = 0.75
    link_share: float = 0.75
    near_delay: float = 1e-5
    near_hop: float = 2e-6
    far_delay: float = 2.5e-5
    far_hop: float = 1e-5
    layer_delay: float = 1e-4
    reserve: float = 4e9
    machine: Machine = field(default_factory=Machine)
    profile: Profile | None = None
    processes: int = 1

    @property
    def _messages(self) -> Profile:
        return self.profile or Profile()

    @property
    def _sends(self) -> bool:
        """Whether messages were measured."""
        return bool(self._messages.messages)

    @property
    def cores(self) -> int:
        """Processors that a host's processes share; 0: each has a device."""
        return 0 if self.profile is None else self.profile.cores

    @property
    def threads(self) -> int:
        """Of each process."""
        return 1 if self.profile is None else self.profile.threads_of(self.processes)

    def shared_by(self, num_processes: int) -> Hardware:
        """As it is to each of so many processes."""
        return replace(self, processes=min(num_processes, self.per_host)) if self.cores else self

    @property
    def usable(self) -> float:
        """Bytes for models and calls; processes without devices share the host's."""
        return self.memory / (self.processes if self.cores else 1) - self.reserve

    def rate_between(self, span: int) -> tuple[float, float]:
        """Bytes a second and seconds a message between neighbours in a group of devices that spans `span`."""
        if span <= self.per_host:
            return self.near_rate * self.link_share, self.near_delay
        return self.far_rate * self.link_share, self.far_delay

    def sum_seconds(
        self, num_bytes: float, members: int, span: int, among: int | None = None, *, late: bool = False
    ) -> float:
        """All-reduce of so many bytes over `members` devices, evenly spread over `span` neighbouring ones.

        A ring's 2 (n - 1) / n of the bytes are sent, and messages wait for each other as in a tree: NCCL takes
        either by the size. Between hosts, each host's members share out what crosses.
        `among` processes are at it, in groups of `members` (default: `span`); links of a host are not shared.
        `late`: it comes after products, which not all end at once.
        """
        if self._sends and members > 1 and span <= self.per_host:
            return self._messages.message("late" if late else "sum", num_bytes, members, among or span)
        return 2 * self.gather_seconds(num_bytes, members, span)

    def gather_seconds(self, num_bytes: float, members: int, span: int, among: int | None = None) -> float:
        """All-gather or reduce-scatter of so many bytes in all, over such a group (see `sum_seconds`)."""
        if members <= 1:
            return 0.0
        if self._sends and span <= self.per_host:
            return self._messages.message("gather", num_bytes, members, among or span)
        hosts = max(1, ceil(span / self.per_host))
        if hosts == 1:
            rate, delay = self.rate_between(span)
            return (members - 1) * num_bytes / members / rate + delay + self.near_hop * log2(members)
        within = max(1, members // hosts)
        across = min(hosts, members)
        far, delay = self.far_rate * self.link_share, self.far_delay
        inside = self.gather_seconds(num_bytes, within, min(span, self.per_host))
        delay += self.far_hop * log2(across)
        return inside + (across - 1) * num_bytes / across / within / far + delay

    def send_seconds(self, num_bytes: float, *, far: bool) -> float:
        """From one device to another."""
        if self._sends and not far:
            return self._messages.message("send", num_bytes, 2, 2)
        rate, delay = (self.far_rate, self.far_delay) if far else (self.near_rate, self.near_delay)
        return num_bytes / (rate * self.link_share) + delay

    def changed(self, **factors: float) -> Hardware:
        """With some numbers multiplied: `changed(far_rate=2)` has a network twice as fast."""
        return replace(self, **{key: getattr(self, key) * factor for key, factor in factors.items()})


def _gpu(
    name: str, memory: float, peaks: tuple[float, float], rate: float, near: float, far: float, pcie: float
) -> Hardware:
    flops = MappingProxyType(dict(zip(COMPUTED_IN, peaks, strict=True)))
    return Hardware(
        name=name, memory=memory, flops=flops, memory_rate=rate, near_rate=near, far_rate=far, host_rate=pcie
    )


COMPUTED_IN = ("bfloat16", "float32")
"""Of the data sheets' peaks, dense products in bfloat16, and fp32 without TF32, which runs do not turn on."""


KNOWN: Mapping[str, Hardware] = MappingProxyType(
    {
        # NVIDIA A100 80GB SXM datasheet: 312 and 19.5 TFLOP/s, 2039 GB/s, NVLink 600 GB/s both ways; 8 x 200 Gb/s.
        "a100": _gpu("a100", 85e9, (312e12, 19.5e12), 2.039e12, 300e9, 25e9, 32e9),
        # NVIDIA H100 SXM datasheet: 989 and 67 TFLOP/s dense, 3.35 TB/s, NVLink 900 GB/s; DGX: 8 x 400 Gb/s.
        "h100": _gpu("h100", 84.9e9, (989e12, 67e12), 3.35e12, 450e9, 50e9, 64e9),
        # NVIDIA H200 SXM datasheet: 141 GB, 4.8 TB/s, else as H100.
        "h200": _gpu("h200", 150e9, (989e12, 67e12), 4.8e12, 450e9, 50e9, 64e9),
        # NVIDIA DGX B200 datasheet: 180 GB, 8 TB/s, 2250 and 75 TFLOP/s dense, NVLink 1.8 TB/s; 8 x 400 Gb/s.
        "b200": _gpu("b200", 191e9, (2250e12, 75e12), 8e12, 900e9, 50e9, 64e9),
    }
)
"""By the names that `--hardware` takes. Memory is about what CUDA says that such a device has (the names'
GB are nearer to GiB). Shares and delays are estimates, to be replaced by a profile.

Delays: NCCL's own cost model (`src/graph/tuning.cc`, 2.18 and later) takes 6.6 to 14 us for the base of an
operation, and for each hop 0.6 us (LL) to 3.4 or 4 us (Simple) over NVLink, 2.7 to 14 us over a network; 23 us
in all where the switch adds up (NVLS). Ours, with the launch from Python, makes 32 us of a small sum over 8 GPUs.
"""
SAME_MEMORY = 0.05
"""A device whose memory differs by more from a known one's of its name is another edition."""


def like_named(name: str, memory: float) -> tuple[Hardware, bool]:
    """The known device whose rates stand for those of one that CUDA gives this name and so many bytes.

    And whether it is that device: its name is a word of the other's, which is of no slower edition. What is unlike
    all of them is taken to be an A100.
    """
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    found = next((one for key, one in KNOWN.items() if key in words), None)
    if found is None:
        return KNOWN["a100"], False
    return found, not words & {"pcie", "nvl"} and abs(memory / found.memory - 1) <= SAME_MEMORY


def find_hardware(name: str) -> Hardware:
    """A known one, or one that was measured: a JSON file of `Hardware`'s fields. Raises `ConfigError`."""
    if name.lower() in KNOWN:
        return KNOWN[name.lower()]
    path = Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise ConfigError(
            f"`--hardware {name}` is none of {', '.join(KNOWN)} and cpu, and no JSON file of measured numbers"
        )
    try:
        return from_values(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name} is no description of a device: {error}") from None


def from_values(values: Mapping[str, Any]) -> Hardware:
    """What `as_values` gave. Raises `TypeError` for keys that are missing or unknown, `ValueError` for values."""
    given = dict(values)
    for key, value in given.items():
        _check(key, value)
    profile = given.get("profile")
    given["profile"] = None if profile is None else Profile.of(profile)
    given.update({key: int(given[key]) for key in COUNTS if key in given})
    return Hardware(**{**given, "machine": Machine(**given.get("machine", {}))})


NO_RATES = ("reserve", "near_delay", "near_hop", "far_delay", "far_hop", "layer_delay")
"""Numbers that may be 0."""
COUNTS = ("per_host", "processes")


def _check(key: str, value: object) -> None:
    """Raise `ValueError` for a number of `Hardware` that cannot be one."""
    if key == "machine" and not isinstance(value, Mapping):
        raise ValueError(f"`machine` is {value!r}; write its keys, or leave it out")
    if key in ("name", "machine", "profile"):
        return
    if key == "flops":
        _check_peaks(value)
        return
    wanted = "a number of at least 0" if key in NO_RATES else "a number above 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise ValueError(f"`{key}` is {value!r}; write {wanted}")
    if value < 0 or (value == 0 and key not in NO_RATES):
        raise ValueError(f"`{key}` is {value:g}; write {wanted}")
    if key in COUNTS and value != int(value):
        raise ValueError(f"`{key}` is {value:g}; write a whole number")
    if key.endswith("_share") and value > 1:
        raise ValueError(f"`{key}` is {value:g}; it is a part of 1")


def _check_peaks(value: object) -> None:
    """As `_check`, of `flops`; a type that was not measured has 0 in a profile."""
    if not isinstance(value, Mapping) or not set(COMPUTED_IN) <= value.keys():
        raise ValueError(f"`flops` must hold the peaks of {' and '.join(COMPUTED_IN)}, not {value!r}")
    for name, peak in value.items():
        if peak != 0 or not any(value.values()):
            _check(f"flops.{name}", peak)


def as_values(hardware: Hardware) -> dict[str, Any]:
    """As plain numbers, for JSON."""
    profile = None if hardware.profile is None else hardware.profile.values()
    return {**asdict(replace(hardware, flops=dict(hardware.flops), profile=None)), "profile": profile}
