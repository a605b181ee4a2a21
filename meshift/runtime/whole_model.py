"""A model put together from its parts, in one process and in the host's memory.

No device need hold all of it. It knows nothing of roles, of files or of when a model is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from meshift.layout.layout import Placement
from meshift.layout.shard import Shard
from meshift.models.decoder import Decoder
from meshift.models.shards import shard_table
from meshift.realloc.dtypes import Dtypes
from meshift.realloc.execute import MAX_BYTES, Reallocation, Site
from meshift.realloc.plan import plan


def put_together(
    model: Decoder,
    held: Mapping[str, torch.Tensor],
    source: Placement,
    target: Placement,
    site: Site,
    max_bytes: int = MAX_BYTES,
) -> None:
    """Fill the target's process's `model`, a whole one on the CPU, from what processes of `source` hold.

    Parameters pass through that process's device, at most `max_bytes` of them at a time, or one. Every process of
    both placements calls it; those that only give have any `model` of the same table, which stays.
    """
    table, dtype = shard_table(model.config, model.head_kind), dtype_of(model)
    whole = dict(model.named_parameters())
    for names in _parts_of(table, max_bytes // model.dtype.itemsize):
        dtypes = Dtypes(source=dtype, target=dtype)
        moving = plan(source, target, table, dtypes=dtypes, leave_out=table.keys() - names)
        arrived = Reallocation(moving, table, site).run(held)
        for name, tensor in arrived.shards.items():
            whole[name].data = tensor.cpu()


def dtype_of(model: Decoder) -> str:
    """The type of the weights, under torch's name for it."""
    return str(model.dtype).removeprefix("torch.")


def _parts_of(table: Mapping[str, Shard], most: int) -> Iterator[set[str]]:
    """All parameters in order, as many together as have at most so many numbers, or one."""
    names: set[str] = set()
    room = most
    for name, shard in table.items():
        if names and shard.num_elements > room:
            yield names
            names, room = set(), most
        names.add(name)
        room -= shard.num_elements
    yield names
