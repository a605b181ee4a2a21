"""Plans that name hosts: their devices in the order of processes, and placements with those numbers instead.

It knows nothing of whether such hosts exist; the launcher asks the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping

from meshift.errors import ConfigError
from meshift.graph.calls import Kind
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device, Mesh
from meshift.runtime.launch.cluster import in_order

Placements = Mapping[str, Mapping[Kind, Placement]]
FIRST = Device(index=0)
"""Where a role runs that the plan does not name."""


def named_devices(placements: Placements) -> tuple[Device, ...]:
    """The devices of a plan that names hosts, by host and number; none where it names none.

    Raises `ConfigError` where some of its meshes name hosts and others do not.
    """
    used = {
        d: f"plan.{role}.{kind}"
        for role, by in placements.items()
        for kind, p in by.items()
        for d in p.mesh.devices
    }
    if not any(device.host for device in used):
        return ()
    for device, where in used.items():
        if not device.host and device != FIRST:
            raise ConfigError(
                f"`{where}.mesh` names no host, but other meshes of `plan` do; name the host in each"
            )
    return tuple(sorted((d for d in used if d.host), key=lambda d: (in_order(d.host), d.index)))


def numbered(placements: Placements) -> dict[str, dict[Kind, Placement]]:
    """Placements whose devices have the numbers of their processes, and no hosts."""
    numbers = {device: Device(index=i) for i, device in enumerate(named_devices(placements))}
    return {
        role: {
            kind: Placement(mesh=Mesh(devices=tuple(numbers.get(d, d) for d in p.mesh.devices)), layout=p.layout)
            for kind, p in by.items()
        }
        for role, by in placements.items()
    }


def refuse_hosts(placements: Placements) -> None:
    """Raise `ConfigError` where a mesh names a host, for a launcher that has only this machine."""
    for role, by in placements.items():
        for kind, placement in by.items():
            if any(placement.mesh.hosts):
                raise ConfigError(
                    f"`plan.{role}.{kind}` is on {placement.mesh}, but all processes run on this machine; "
                    "give numbers only, or set launch.launcher=ray"
                )
