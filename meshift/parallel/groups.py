"""The processes that share an axis of a layout: groups for its tensor, data and pipeline ranks.

It knows nothing of models or of what is sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from meshift.layout.layout import Coordinates, Layout, Placement
from meshift.layout.mesh import Device


@dataclass(frozen=True, kw_only=True)
class Peers:
    """The processes that stand like this one but on one axis, in the order of that axis.

    `ranks` are their ranks in the world, `index` is this process's place among them; `group` is None where it is
    alone, and then nothing is sent. `back` is a group of the same processes for what goes to earlier ones: NCCL
    does all that two processes send each other in one group in one order, so that each would wait for the other.
    """

    ranks: tuple[int, ...]
    index: int
    group: dist.ProcessGroup | None
    back: dist.ProcessGroup | None = None

    def __len__(self) -> int:
        return len(self.ranks)

    def in_order(self, gathered: Sequence[Any]) -> list[Any]:
        """What a gather over the group gives, in the peers' order: torch sorts a group's ranks."""
        places = {rank: place for place, rank in enumerate(sorted(self.ranks))}
        return [gathered[places[rank]] for rank in self.ranks]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands in a placement, and who stands on each axis with it.

    `device` is where it keeps its part of a model; None: where the model is that it is given.
    """

    layout: Layout
    coordinates: Coordinates
    tensor: Peers
    data: Peers
    pipeline: Peers
    device: torch.device | None = None

    @property
    def rank(self) -> int:
        """The rank in the layout."""
        return self.layout.rank(self.coordinates)


def join(placement: Placement, device: Device, ranks: Mapping[Device, int]) -> Place | None:
    """Form the groups of a placement, and say where this process's device stands in it (None: nowhere).

    `ranks` are all devices' ranks in the world. Every process of the world calls this for every placement, in the
    same order, also those that are not in it: torch gives groups their names by counting.
    """
    layout = placement.layout
    own = placement.mesh.rank_of(device)
    found: dict[str, Peers] = {}
    for axis in ("tensor", "data", "pipeline"):
        for line in _lines(layout, axis):
            of_line = [ranks[placement.device(rank)] for rank in line]
            peers = _form(of_line, line.index(own) if own in line else None, two_ways=axis == "pipeline")
            if peers is not None:
                found[axis] = peers
    return None if own is None else Place(layout=layout, coordinates=layout.coordinates(own), **found)


def new_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup | None:
    """As torch's, which waits half an hour for a peer, whatever this run was told: this one as long as the run."""
    whole = dist.group.WORLD
    timeout = None
    if whole is not None and "gloo" in dist.get_backend():
        timeout = whole._get_backend(torch.device("cpu")).options._timeout
    group: dist.ProcessGroup | None = dist.new_group(list(ranks), timeout=timeout, backend=backend)
    return group


def _lines(layout: Layout, axis: str) -> list[list[int]]:
    """Ranks that differ on one axis only, for every place on the others."""
    size = getattr(layout, axis)
    firsts = [r for r in range(layout.num_ranks) if getattr(layout.coordinates(r), axis) == 0]
    return [[layout.rank(replace(layout.coordinates(r), **{axis: i})) for i in range(size)] for r in firsts]


def sends_in_one_order() -> bool:
    """Whether messages between two processes of a group wait for one another, whichever way they go."""
    return "nccl" in dist.get_backend()


def _form(ranks: list[int], index: int | None, *, two_ways: bool) -> Peers | None:
    """The group of these ranks of the world; None where this process is not of them."""
    group = back = new_group(ranks) if len(ranks) > 1 else None
    if group is not None and two_ways and sends_in_one_order():
        back = new_group(ranks)
    return None if index is None else Peers(ranks=tuple(ranks), index=index, group=group, back=back)
