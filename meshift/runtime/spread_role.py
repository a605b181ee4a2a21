"""A role over several processes: a `LocalRole` in each of its placements, and its parameters moving between them.

It meets `step.Role` in the processes that take part in a call, each of which makes the call with the same batch
and gets the same outcome. It knows nothing of graphs or of who waits for whom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from meshift.batch import Batch, Outcome
from meshift.errors import ConfigError, ReallocationError
from meshift.graph.calls import Kind
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Mesh
from meshift.models.decoder import Decoder
from meshift.models.shards import shard_table
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import Peers, Place, join
from meshift.parallel.tensor import cut_model
from meshift.realloc.dtypes import Dtypes
from meshift.realloc.execute import Reallocation, Site
from meshift.realloc.plan import plan
from meshift.runtime.role import LocalRole
from meshift.runtime.world import World

MakeRole = Callable[[Decoder, Place, bool], LocalRole]
"""From a cut model, where it stands, and whether it is trained, to the role there."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """Parameters from where they are trained to another placement; `peers` are the processes of both."""

    reallocation: Reallocation
    target: Placement
    peers: Peers


class SpreadRole:
    """One process's share of a role. `placements` says where calls of a kind run; `train` is where weights live.

    All processes of the world make it at the same point, also those that are in none of its placements.
    """

    def __init__(
        self,
        name: str,
        placements: Mapping[Kind, Placement],
        world: World,
        open_model: Callable[[], Decoder],
        make_role: MakeRole,
    ) -> None:
        """`open_model` gives the whole model, the same each time; a placement without training stands still."""
        self.name = name
        self.placements = placements
        self.world = world
        self._open_model = open_model
        self._first = next(device for device, rank in world.ranks.items() if rank == 0)
        self.home = placements.get("train") or next(iter(placements.values()))
        self._locals: dict[Placement, LocalRole] = {}
        for placement in dict.fromkeys((self.home, *placements.values())):
            place = join(placement, world.device, world.ranks)
            if place is not None:
                is_home = placement == self.home and "train" in placements
                self._locals[placement] = make_role(cut_model(open_model(), place.tensor), place, is_home)
        self._moves = [move for p in dict.fromkeys(placements.values()) if (move := self._move_to(p))]

    def members(self, kind: Kind) -> tuple[int, ...]:
        """The processes that take part in a call of this kind, the moves that follow it left out."""
        return self.world.members(self.placements[kind])

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen."""
        return self._at(self.home).version

    def generate(self, task: Any, batch: Batch) -> Outcome:
        """See `LocalRole`."""
        return self._at(self.placements["generate"]).generate(task, batch)

    def infer(self, task: Any, batch: Batch) -> Outcome:
        """See `LocalRole`."""
        return self._at(self.placements["infer"]).infer(task, batch)

    def train(self, task: Any, batch: Batch, *, step: int) -> Outcome:
        """See `LocalRole`. The other placements have the new weights after `publish` only."""
        return self._at(self.placements["train"]).train(task, batch, step=step)

    def publish(self) -> dict[str, float]:
        """Move new weights to where else they are used; called by every process after each training call.

        Gives `sync/bytes` (sent and received by this process) and `sync/seconds`. Raises `ReallocationError` where
        what arrived is not what was sent.
        """
        metrics: dict[str, float] = {}
        for move in self._moves:
            held = self._parameters(self.home)
            arrived = move.reallocation.run(held, self._parameters(move.target))
            if move.target in self._locals:
                _bind(self._locals[move.target].model, arrived.shards)
            move.reallocation.verify(held, arrived.shards)
            self._settle_version(move)
            moved = arrived.sent_bytes + arrived.received_bytes
            metrics["sync/bytes"] = metrics.get("sync/bytes", 0.0) + moved
            metrics["sync/seconds"] = metrics.get("sync/seconds", 0.0) + arrived.seconds
        return metrics

    def whole(self) -> Decoder | None:
        """The whole model with its weights of now, in process 0; every process calls this."""
        alone = Placement(mesh=Mesh(devices=(self._first,)), layout=Layout())
        if self.home == alone:
            return self._locals[alone].model if alone in self._locals else None
        members = self.world.members(self.home, alone)
        if self.world.rank not in members:
            return None
        is_first = self.world.device == self._first
        model = self._open_model() if is_first else self._at(self.home).model
        site = Site(device=self.world.device, ranks=self.world.ranks)
        table, dtype = shard_table(model.config, model.head_kind), _dtype_of(model)
        moving = plan(self.home, alone, table, dtypes=Dtypes(source=dtype, target=dtype))
        into = {name: p.detach() for name, p in model.named_parameters()} if is_first else None
        arrived = Reallocation(moving, table, site).run(self._parameters(self.home), into)
        _bind(model, arrived.shards)
        return model if is_first else None

    def master_weights(self) -> Mapping[str, torch.Tensor]:
        """This rank's part of the parameters where they are trained."""
        return self._at(self.home).master_weights()

    def mix(self, source: Any, rate: float) -> None:
        """Raises `ConfigError`: not over several processes yet."""
        raise ConfigError("a run with a `plan` cannot move its reference yet: set reference.sync_ref_model=false")

    def _at(self, placement: Placement) -> LocalRole:
        if placement not in self._locals:
            raise ValueError(f"process {self.world.rank} is not in {placement}, where {self.name} runs")
        return self._locals[placement]

    def _move_to(self, target: Placement) -> Move | None:
        """The move to a placement, made by every process; None where there is nothing to move, or not here."""
        if target == self.home or "train" not in self.placements:
            return None
        peers = self.world.peers(self.world.members(self.home, target))
        if peers is None:
            return None
        model = next(iter(self._locals.values())).model
        table = shard_table(model.config, model.head_kind)
        dtype = _dtype_of(model)
        frozen = gather_facts(self._frozen(), peers)
        leave_out = next(names for names in frozen if names is not None)
        moving = plan(self.home, target, table, dtypes=Dtypes(source=dtype, target=dtype), leave_out=leave_out)
        site = Site(device=self.world.device, ranks=self.world.ranks, group=peers.group)
        reallocation = Reallocation(moving, table, site)
        reallocation.agree()
        return Move(reallocation=reallocation, target=target, peers=peers)

    def _frozen(self) -> list[str] | None:
        """Parameters that training leaves as they are; None where this process does not train."""
        role = self._locals.get(self.home)
        return None if role is None else [n for n, p in role.model.named_parameters() if not p.requires_grad]

    def _parameters(self, placement: Placement) -> dict[str, torch.Tensor]:
        role = self._locals.get(placement)
        return {} if role is None else {name: p.detach() for name, p in role.model.named_parameters()}

    def _settle_version(self, move: Move) -> None:
        trainer = self._locals.get(self.home)
        versions = gather_facts(None if trainer is None else trainer.version, move.peers)
        known = {version for version in versions if version is not None}
        if len(known) != 1:
            raise ReallocationError(f"the {self.name}'s ranks have weights of versions {sorted(known)}")
        if move.target in self._locals:
            self._locals[move.target].trainer.version = known.pop()


def _bind(model: Decoder, shards: Mapping[str, torch.Tensor]) -> None:
    """Let parameters whose memory is that of where they are trained be that tensor."""
    for name, parameter in model.named_parameters():
        if name in shards and shards[name].data_ptr() != parameter.data_ptr():
            parameter.data = shards[name]


def _dtype_of(model: Decoder) -> str:
    return str(model.embedding.weight.dtype).removeprefix("torch.")


class Everywhere:
    """A role whose calls every process makes, and gets the outcomes of, whoever takes part in them."""

    def __init__(self, role: SpreadRole) -> None:
        self._role = role

    def generate(self, task: Any, batch: Batch) -> Outcome:
        """See `LocalRole`."""
        return self._shared("generate", lambda: self._role.generate(task, batch))

    def infer(self, task: Any, batch: Batch) -> Outcome:
        """See `LocalRole`."""
        return self._shared("infer", lambda: self._role.infer(task, batch))

    def _shared(self, kind: Kind, run: Callable[[], Outcome]) -> Outcome:
        world, members = self._role.world, self._role.members(kind)
        if world.rank not in members:
            return world.receive(members[0], 0)
        outcome = run()
        if world.rank == members[0]:
            world.send(outcome, sorted(set(world.ranks.values()) - set(members)), 0)
        return outcome
