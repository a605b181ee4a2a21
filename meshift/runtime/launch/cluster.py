"""The nodes of a cluster as a plan sees them: which have devices, in what order, and which device is whose.

Pure arithmetic. It knows nothing of who tells what nodes there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshift.errors import LayoutError
from meshift.layout.mesh import Mesh


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of a cluster. `id` is its own; a name may be that of several, if somebody named them so."""

    id: str
    name: str
    address: str
    num_devices: int

    def __str__(self) -> str:
        return f"{self.name} ({self.num_devices})"


def nodes_of(rows: Iterable[Mapping[str, Any]]) -> tuple[str, list[Node]]:
    """What a device is (`GPU` where any node has one, else `CPU`), and the live nodes that have some, in order.

    `rows` are what `ray.nodes()` gives. The order is that of the names, numbers in them counted: `node2` comes
    before `node10`, so that a plan means the same devices each time.
    """
    alive = [row for row in rows if row["Alive"]]
    kind = "GPU" if any(row["Resources"].get("GPU", 0) for row in alive) else "CPU"
    nodes = [
        Node(
            id=row["NodeID"],
            name=row.get("NodeName") or row["NodeManagerAddress"],
            address=row["NodeManagerAddress"],
            num_devices=int(row["Resources"].get(kind, 0)),
        )
        for row in alive
    ]
    return kind, sorted((n for n in nodes if n.num_devices), key=lambda node: (*in_order(node.name), node.id))


def in_order(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """A key that sorts names with the numbers in them by size."""
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts], name


def seats(mesh: Mesh, nodes: Sequence[Node]) -> list[Node]:
    """The node of each device of the mesh. Numbers without hosts count through the nodes.

    Raises `LayoutError` for a device that is not there, or a host whose name two nodes have.
    """
    named = any(mesh.hosts)
    for host in mesh.hosts if named else ():
        if sum(node.name == host for node in nodes) > 1:
            raise LayoutError(f"two nodes are called {host}; start each with a `--node-name` of its own")
    known = {node.name if named else node.id: node for node in nodes}
    placed = Mesh.parse(str(mesh), {name: node.num_devices for name, node in known.items()})
    return [known[device.host] for device in placed.devices]
