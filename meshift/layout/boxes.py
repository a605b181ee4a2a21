"""The box of a parameter that each rank of a layout holds, from the shard table; arithmetic of boxes.

A box is [start, stop) along each dim of the whole parameter. Knows nothing of meshes or tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from meshift.layout.layout import Coordinates, Layout
from meshift.layout.shard import Shard

Interval = tuple[int, int]
Box = tuple[Interval, ...]
Cells = Mapping[Box, tuple[int, ...]]  # box -> the ranks that hold it


def boxes_of(layout: Layout, shards: Mapping[str, Shard], rank: int) -> dict[str, Box]:
    """The box of every parameter that a rank holds, in the order of the table.

    A data-sharded parameter with fewer rows than data ranks has empty boxes on the last ones. Raises
    `LayoutError` where the model cannot be cut so.
    """
    coordinates, num_layers = layout.coordinates(rank), count_layers(shards)
    return {
        name: held_box(shard, layout, coordinates)
        for name, shard in shards.items()
        if coordinates.pipeline in stages_of(shard, layout, num_layers)
    }


def count_layers(shards: Mapping[str, Shard]) -> int:
    """Layers of the model that the table describes."""
    return 1 + max((shard.layer for shard in shards.values() if shard.layer is not None), default=-1)


def stages_of(shard: Shard, layout: Layout, num_layers: int) -> tuple[int, ...]:
    """The pipeline stages that hold a parameter: one, or the first and the last for a tied embedding."""
    last = layout.pipeline - 1
    if shard.tied:
        return (0, last) if last else (0,)
    if shard.layer is not None:
        return (next(s for s, layers in enumerate(layout.stage_layers(num_layers)) if shard.layer in layers),)
    return (0,) if shard.stage == "embedding" else (last,)


def held_box(shard: Shard, layout: Layout, coordinates: Coordinates) -> Box:
    """The box held at these coordinates by a stage that has the parameter.

    Tensor ranks cut first. Then, in a sharded layout, data ranks cut the rows (dim 0) of what the tensor rank
    has as FSDP2 does: n rows over d ranks in chunks of ceil(n / d), so that the last may be smaller or empty.
    """
    box = [(0, size) for size in shard.shape]
    if shard.split is not None:
        box[shard.split.dim] = shard.split.bounds(coordinates.tensor, layout.tensor)
    if layout.sharded:
        start, stop = box[0]
        chunk = -(-(stop - start) // layout.data)
        first = min(stop, start + coordinates.data * chunk)
        box[0] = (first, min(stop, first + chunk))
    return tuple(box)


def cells_of(shard: Shard, layout: Layout, stages: Sequence[int]) -> Cells:
    """Each box of a parameter that is not empty, and the ranks of `stages` that hold it.

    The boxes form a grid: they are disjoint and cover the parameter, on each stage.
    """
    cells: dict[Box, list[int]] = {}
    for stage in stages:
        for data in range(layout.data):
            for tensor in range(layout.tensor):
                where = Coordinates(data=data, tensor=tensor, pipeline=stage)
                box = held_box(shard, layout, where)
                if num_elements(box):
                    cells.setdefault(box, []).append(layout.rank(where))
    return {box: tuple(ranks) for box, ranks in cells.items()}


def num_elements(box: Box) -> int:
    """Numbers in a box."""
    return prod(stop - start for start, stop in box)


def shape_of(box: Box) -> tuple[int, ...]:
    """The shape of the tensor that fills the box."""
    return tuple(stop - start for start, stop in box)


def offset_in(box: Box, whole: Box) -> tuple[int, ...]:
    """Where a box begins in a box that contains it, along each dim."""
    return tuple(inner[0] - outer[0] for inner, outer in zip(box, whole, strict=True))


def cut_box(box: Box, most: int) -> Iterator[Box]:
    """Cut a box, in order, into boxes of at most `most` >= 1 numbers: of whole rows, where one fits."""
    first, rest = box[0], box[1:]
    row = num_elements(rest)
    if row <= most:
        step = most // row
        for start in range(*first, step):
            yield ((start, min(first[1], start + step)), *rest)
        return
    for start in range(*first):
        for part in cut_box(rest, most):
            yield ((start, start + 1), *part)
