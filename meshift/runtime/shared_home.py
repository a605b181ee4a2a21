"""Parameters where they are trained, in memory that all processes of one machine map.

Whoever reads them copies from there, and nothing is sent. It knows nothing of roles or of when parameters move.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from meshift.layout.layout import Placement
from meshift.models.decoder import Decoder
from meshift.parallel.exchange import gather_facts
from meshift.realloc.execute import Reallocation
from meshift.realloc.near import NearMemory, machine
from meshift.runtime.world import World


def share_home(world: World, home: Placement, model: Decoder | None, moves: Sequence[Reallocation]) -> None:
    """Let the moves from `home` copy what lies there, if all processes are on one machine and may map it.

    `model` is this process's part of the model at home, whose parameters get other memory; None where it has none.
    Every process of the world calls it.
    """
    everybody = world.everybody
    where: list[Any] | None = None
    memory = None
    if model is not None and NearMemory.is_possible():
        held = {name: p.detach() for name, p in model.named_parameters()}
        with suppress(OSError, RuntimeError):  # not allowed here: parameters are sent then
            memory = NearMemory.make({name: (tuple(t.shape), t.dtype) for name, t in held.items()})
            where = memory.where
    told = gather_facts([machine(), where], everybody)
    homes = [told[world.ranks[device]][1] for device in home.mesh.devices]
    if len({name for name, _ in told}) == 1 and None not in homes:
        if model is not None and memory is not None:
            for name, parameter in model.named_parameters():
                memory.tensors[name].copy_(parameter.detach())
                parameter.data = memory.tensors[name]
        with suppress(OSError, RuntimeError):  # not allowed here either
            for move in moves:
                forms = move.senders()
                move.near = {rank: NearMemory.open(homes[rank], form) for rank, form in forms.items()}
    # All have mapped what they need, or nobody reads there: the others would wait for what is not sent.
    if not all(gather_facts(all(move.near is not None for move in moves), everybody)):
        for move in moves:
            move.near = None
    if memory is not None:
        memory.close()
