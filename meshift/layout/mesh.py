"""Meshes: ordered sets of devices, each known by its host and its number there; how they are written.

Knows nothing of layouts, of models, or of whether such devices exist.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from meshift.errors import LayoutError

MAX_DEVICES = 1 << 20
_FORM = "write it as `0-3`, `0,2,5` or `node0:0-3,node1:0-3`"


@dataclass(frozen=True, kw_only=True, order=True)
class Device:
    """One device: its number on its host. The host is empty where there is only one and it needs no name."""

    host: str = ""
    index: int

    def __str__(self) -> str:
        return f"{self.host}:{self.index}" if self.host else str(self.index)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """An ordered set of devices; a device's place in it is its rank.

    Example: `Mesh.parse("node0:0-1,node1:0")` has the ranks 0 and 1 on node0 and the rank 2 on node1.
    Raises `LayoutError` where there is no device, or one twice, or only some have a host.
    """

    devices: tuple[Device, ...]

    def __post_init__(self) -> None:
        if not self.devices:
            raise LayoutError("A mesh has no device; name at least one, for example `0`.")
        if len(self._ranks) < len(self.devices):
            twice = next(d for rank, d in enumerate(self.devices) if self._ranks[d] != rank)
            raise LayoutError(f"The mesh `{self}` names the device {twice} twice; name it once.")
        if "" in self.hosts and any(self.hosts):
            raise LayoutError(f"The mesh `{self}` has devices without a host beside others; name each one's host.")

    @classmethod
    def parse(cls, text: str | int, cluster: Mapping[str, int] | None = None) -> Mesh:
        """The mesh that a config writes: numbers and ranges, after `host:` where hosts have names.

        A host holds for all numbers up to the next host. `cluster` maps each host to its number of devices, in
        order; with it, hosts and numbers are checked, and numbers before any host count through the whole
        cluster: with 8 devices on each host, `6-9` are the last two of the first and the first two of the second.
        """
        host, devices = "", []
        for item in str(text).split(","):
            before, colon, numbers = item.rpartition(":")
            host = before.strip() if colon else host
            if colon and not host:
                raise LayoutError(f"The mesh `{text}` has a colon without a host before it; {_FORM}.")
            devices += [Device(host=host, index=index) for index in _numbers(numbers, str(text))]
        return cls(devices=tuple(devices if cluster is None else _placed(devices, cluster, str(text))))

    @property
    def hosts(self) -> tuple[str, ...]:
        """The host of each rank."""
        return tuple(device.host for device in self.devices)

    def rank_of(self, device: Device) -> int | None:
        """The place of a device in this mesh; None: it is not in it."""
        return self._ranks.get(device)

    @cached_property
    def _ranks(self) -> Mapping[Device, int]:
        return {device: rank for rank, device in enumerate(self.devices)}

    def __len__(self) -> int:
        return len(self.devices)

    def __str__(self) -> str:
        return ",".join(_written(self.devices))


def _numbers(text: str, mesh: str) -> range:
    found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:-\s*([0-9]{1,9})\s*)?", text)
    if found is None:
        raise LayoutError(f"The mesh `{mesh}` has `{text.strip()}` where a number or a range stands; {_FORM}.")
    first, last = int(found[1]), int(found[2] or found[1])
    if not first <= last < first + MAX_DEVICES:
        raise LayoutError(f"The mesh `{mesh}` has the range `{text.strip()}`; ranges go upwards; {_FORM}.")
    return range(first, last + 1)


def _placed(devices: Iterable[Device], cluster: Mapping[str, int], mesh: str) -> Iterator[Device]:
    """The devices with their hosts, each of which is in the cluster."""
    everywhere = [Device(host=host, index=index) for host, count in cluster.items() for index in range(count)]
    for device in devices:
        if device.host and device.host not in cluster:
            raise LayoutError(f"The mesh `{mesh}` names the host {device.host}; hosts are {', '.join(cluster)}.")
        count = cluster[device.host] if device.host else len(everywhere)
        if device.index >= count:
            where = f"{device.host} has" if device.host else "there are"
            raise LayoutError(
                f"The mesh `{mesh}` names the device {device}, but {where} {count}; they count from 0."
            )
        yield device if device.host else everywhere[device.index]


def _written(devices: tuple[Device, ...]) -> Iterator[str]:
    """Runs of neighbouring numbers as ranges, with the host where it changes."""
    start = 0
    for stop in range(1, len(devices) + 1):
        first, last = devices[start], devices[stop - 1]
        if stop < len(devices) and devices[stop] == Device(host=last.host, index=last.index + 1):
            continue
        new_host = first.host != (devices[start - 1].host if start else "")
        numbers = str(first.index) if first == last else f"{first.index}-{last.index}"
        yield f"{first.host}:{numbers}" if new_host else numbers
        start = stop
