"""Layouts (how one model is cut over ranks: `d2t4p1`) and placements (a layout on a mesh).

Ranks and their coordinates, and which layers a pipeline stage has. Knows nothing of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from meshift.errors import LayoutError
from meshift.layout.mesh import Device, Mesh

_AXES = {"d": "data", "t": "tensor", "p": "pipeline"}


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Where a rank stands on each axis of its layout."""

    data: int
    tensor: int
    pipeline: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model is cut: ranks on the data, the tensor and the pipeline axis.

    With `sharded`, written `s`, the data ranks share out weights and optimizer state among themselves, as FSDP2
    does; without, each holds a copy. Neighbouring ranks differ on the tensor axis first, then on the data axis,
    then on the pipeline axis: `rank = (pipeline * data ranks + data) * tensor ranks + tensor`.
    """

    data: int = 1
    tensor: int = 1
    pipeline: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        if min(self.data, self.tensor, self.pipeline) < 1:
            raise LayoutError(f"The layout `{self}` has an axis without a rank; each needs at least 1.")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """The layout written `d2t4p1`, or `d2t4p1s`; an axis that is left out has one rank."""
        axes = re.findall(r"([dtp])([0-9]{1,7})", text)
        written = "".join(letter + count for letter, count in axes)
        if not axes or text.removesuffix("s") != written or len(dict(axes)) < len(axes):
            raise LayoutError(
                f"`{text}` is no layout; write the ranks on each axis as d (data), t (tensor) and p (pipeline), "
                "as in `d2t4p1`, with an s at the end where data ranks share out the state."
            )
        return cls(sharded=text.endswith("s"), **{_AXES[letter]: int(count) for letter, count in axes})

    @property
    def num_ranks(self) -> int:
        """Ranks that the layout needs."""
        return self.data * self.tensor * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank stands. Raises `ValueError` for a rank that does not exist."""
        if not 0 <= rank < self.num_ranks:
            raise ValueError(f"There is no rank {rank} in {self}.")
        rest, tensor = divmod(rank, self.tensor)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(data=data, tensor=tensor, pipeline=pipeline)

    def rank(self, coordinates: Coordinates) -> int:
        """The rank that stands there."""
        return (coordinates.pipeline * self.data + coordinates.data) * self.tensor + coordinates.tensor

    def stage_layers(self, num_layers: int) -> tuple[range, ...]:
        """The layers of each pipeline stage; counts differ by at most one.

        Layers left over go to the middle stages first, then to the first, since that one has the embedding and
        the most micro-batches in flight, and the last one the head. Raises `LayoutError` for a stage without one.
        """
        if num_layers < self.pipeline:
            raise LayoutError(
                f"The layout {self} has more pipeline stages than the model has layers ({num_layers}); "
                f"use p{num_layers} or less."
            )
        each, left = divmod(num_layers, self.pipeline)
        last = self.pipeline - 1
        larger = (*range(1, last), 0)[:left]
        stages, start = [], 0
        for stage in range(self.pipeline):
            stop = start + each + (stage in larger)
            stages.append(range(start, stop))
            start = stop
        return tuple(stages)

    def __str__(self) -> str:
        return f"d{self.data}t{self.tensor}p{self.pipeline}{'s' * self.sharded}"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A layout on a mesh: its rank r runs on the mesh's device r. `LayoutError` where their sizes differ."""

    mesh: Mesh
    layout: Layout

    def __post_init__(self) -> None:
        if len(self.mesh) != self.layout.num_ranks:
            raise LayoutError(
                f"The layout {self.layout} needs {self.layout.num_ranks} devices, but the mesh `{self.mesh}` "
                f"has {len(self.mesh)}; change one of them."
            )

    @classmethod
    def parse(cls, mesh: str | int, layout: str, cluster: Mapping[str, int] | None = None) -> Placement:
        """A mesh and a layout as a config writes them; `cluster` as in `Mesh.parse`."""
        return cls(mesh=Mesh.parse(mesh, cluster), layout=Layout.parse(layout))

    def device(self, rank: int) -> Device:
        """The device that a rank runs on."""
        return self.mesh.devices[rank]

    def __str__(self) -> str:
        return f"{self.layout}@{self.mesh}"
