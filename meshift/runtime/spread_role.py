"""A role over several processes: a `LocalRole` in each of its placements, and its parameters moving between them.

It meets `step.Role` in the processes that take part in a call, each of which makes the call with the same batch
and gets the same outcome. It knows nothing of graphs or of who waits for whom.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from meshift.batch import Batch, Outcome
from meshift.config.sections import TrainableConfig
from meshift.errors import ConfigError, ReallocationError
from meshift.generation.rollout import OnPart
from meshift.graph.calls import Kind
from meshift.layout.boxes import Box, boxes_of, cells_of, count_layers, stages_of
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Mesh
from meshift.models.decoder import Decoder
from meshift.models.shards import num_parameters, shard_table
from meshift.parallel.exchange import gather_facts
from meshift.parallel.groups import Peers, Place, join
from meshift.parallel.pipeline import cut_for
from meshift.realloc.dtypes import Dtypes
from meshift.realloc.execute import Reallocation, Site
from meshift.realloc.plan import plan
from meshift.runtime.models import device_for_run
from meshift.runtime.probe import probe
from meshift.runtime.role import AVERAGE, LocalRole
from meshift.runtime.shared_home import share_home
from meshift.runtime.whole_model import dtype_of, put_together
from meshift.runtime.world import World
from meshift.step import Role
from meshift.training.checkpoint import read_state, write_values
from meshift.training.optimizer import is_trained
from meshift.training.stored_tensors import write_boxes

EXACT = Dtypes(source="float32", target="float32")
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
        config: TrainableConfig | None = None,
    ) -> None:
        """`open_model` gives the whole model, the same each time; a placement without training stands still.

        It is best in the host's memory: it is cut there, and only this process's part goes to its device.
        `config` is that of the roles that `make_role` makes: it says what is left out of training.
        """
        self.name, self._config = name, config or TrainableConfig()
        self.is_mixed = False
        self._mixes: dict[str, Move | None] = {}
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
                place = replace(place, device=device_for_run())
                self._locals[placement] = make_role(cut_for(open_model(), place), place, is_home)
        self._moves = [move for p in dict.fromkeys(placements.values()) if (move := self._move_to(p))]
        if "train" in placements and len(set(placements.values())) > 1:
            self._refuse_offload()
            if device_for_run().type == "cpu":
                role = self._locals.get(self.home)
                moves = [move.reallocation for move in self._moves]
                share_home(world, self.home, None if role is None else role.model, moves)

    def members(self, kind: Kind) -> tuple[int, ...]:
        """The processes that take part in a call of this kind, the moves that follow it left out."""
        return self.world.members(self.placements[kind])

    @property
    def version(self) -> int:
        """Optimizer steps that the weights have seen."""
        return self._at(self.home).version

    @property
    def num_numbers(self) -> tuple[int, int]:
        """Numbers of the whole model that are trained, and those that are not; where something of it is here."""
        if not self._locals:
            return 0, 0
        model = next(iter(self._locals.values())).model
        table = shard_table(model.config, model.head_kind)
        fixed = sum(one.num_elements for name, one in table.items() if not self._trains(name, model))
        return num_parameters(table) - fixed, fixed

    def generate(self, task: Any, batch: Batch, on_part: OnPart | None = None) -> Outcome:
        """See `LocalRole`. Of tensor ranks and stages, which have the same, the first one passes parts on."""
        role = self._at(self.placements["generate"])
        ranks = role.trainer.ranks
        is_first = ranks is None or ranks.place.tensor.index == ranks.place.pipeline.index == 0
        return role.generate(task, batch, on_part if is_first else None)

    def infer(self, task: Any, batch: Batch) -> Outcome:
        """See `LocalRole`."""
        return self._at(self.placements["infer"]).infer(task, batch)

    def train(self, task: Any, batch: Batch, *, step: int) -> Outcome:
        """See `LocalRole`. The other placements have the new weights after `publish` only.

        `perf/mfu/<role>` is the part of the call's seconds that it would take at its devices' peak, which is
        `perf/peak_tflops/<role>` for all of them.
        """
        role = self._at(self.placements["train"])
        before = replace(role.work)
        outcome = role.train(task, batch, step=step)
        seconds, flops = role.work.seconds - before.seconds, role.work.flops - before.flops
        used = {}
        if flops and seconds:
            used[f"perf/mfu/{self.name}"] = flops / role.peak_flops / seconds
            used[f"perf/peak_tflops/{self.name}"] = role.peak_flops / 1e12
        return Outcome(batch=outcome.batch, metrics={**outcome.metrics, **used})

    def publish(self) -> dict[str, float]:
        """Move new weights to where else they are used; called by every process after each training call.

        Gives `sync/bytes` (sent and received by this process), `sync/seconds`, and those of the proofs. Raises
        `ReallocationError` where what arrived is not what was sent.
        """
        metrics: dict[str, float] = {}
        for move in self._moves:
            held = self._parameters(self.home)
            arrived = move.reallocation.run(held, self._parameters(move.target))
            if move.target in self._locals:
                _bind(self._locals[move.target].model, arrived.shards)
            started = time.perf_counter()
            move.reallocation.verify(held, arrived.shards)
            self._settle_version(move)
            _add(metrics, "sync/verify_seconds", time.perf_counter() - started)
            if move.target == self.placements.get("generate"):
                here = self._locals.get(self.home), self._locals.get(move.target)
                where = f"the {self.name} at {move.target}", str(self.home)
                started = time.perf_counter()
                metrics["sync/probe_diff_max"] = probe(*here, move.peers, where)
                _add(metrics, "sync/probe_seconds", time.perf_counter() - started)
            _add(metrics, "sync/bytes", arrived.sent_bytes + arrived.received_bytes)
            _add(metrics, "sync/seconds", arrived.seconds)
        self.leave()
        return metrics

    def leave(self) -> None:
        """See `LocalRole`: what is here of the role."""
        for local in self._locals.values():
            local.leave()

    def whole(self) -> Decoder | None:
        """The whole model with its weights of now, in process 0; every process calls this.

        Unless that process has all of it anyway, it is in the host's memory: see `put_together`.
        """
        alone = Placement(mesh=Mesh(devices=(self._first,)), layout=Layout())
        if self.home == alone:
            return self._locals[alone].whole() if alone in self._locals else None
        members = self.world.members(self.home, alone)
        if self.world.rank not in members:
            return None
        is_first = self.world.device == self._first
        model = self._open_model() if is_first else self._at(self.home).model
        put_together(model, self._parameters(self.home), self.home, alone, self._site())
        return model if is_first else None

    def master_weights(self) -> Mapping[str, torch.Tensor]:
        """This rank's part of the parameters where they are trained."""
        return self._at(self.home).master_weights()

    def prepare_mix(self, source: SpreadRole) -> None:
        """Plan how the source's weights come to be mixed into these; every process calls this, once."""
        self._mixes[source.name] = None
        peers = self.world.peers(self.world.members(source.home, self.home))
        if peers is None:
            return
        model = next(iter([*source._locals.values(), *self._locals.values()])).model
        plain = replace(model.config, adapter=None, value_head=False)  # adapters come merged; one head is mixed
        table = shard_table(plain, model.head_kind)
        moving = plan(source.home, self.home, table, dtypes=EXACT, mix=True)
        site = self._site(peers.group)
        reallocation = Reallocation(moving, table, site)
        reallocation.agree()
        self._mixes[source.name] = Move(reallocation=reallocation, target=self.home, peers=peers)

    def mix(self, source: Role, rate: float) -> None:
        """See `LocalRole`; every rank mixes its boxes. All processes of both roles call it, once prepared."""
        assert isinstance(source, SpreadRole)
        move = self._mixes[source.name]
        if move is None:
            return
        trainer, own = source._locals.get(source.home), self._locals.get(self.home)
        held = {} if trainer is None else {n: w.float() for n, w in trainer.master_weights().items()}
        names = [name for name, _ in own.model.named_parameters()] if own is not None else []
        move.reallocation.run(held, {} if own is None else own.averages(names), rate)
        if own is not None:
            own.settle_averages()
        for role in (trainer, own):
            if role is not None:
                role.leave()

    def write_share(self, folder: Path) -> None:
        """Write the boxes of this role's state that no rank before this one writes. Raises `OSError`."""
        local, rank = self._locals.get(self.home), self.home.mesh.rank_of(self.world.device)
        if local is None or rank is None:
            return
        state = local.state()
        if rank == 0:
            write_values(folder, state.values)
        table = shard_table(local.model.config, local.model.head_kind)
        num_layers, layout = count_layers(table), self.home.layout
        turns = {name: turn for turn, name in enumerate(table)}
        boxes: dict[str, tuple[Box, tuple[int, ...]]] = {}
        for key in state.tensors:
            shard, turn = table[_parameter_of(key)], turns[_parameter_of(key)]
            cells = cells_of(shard, layout, stages_of(shard, layout, num_layers))
            if state.tensors[key].dim() == 0:
                if rank == min(map(min, cells.values())):
                    boxes[key] = (), ()
                continue
            for box, holders in cells.items():
                if rank == holders[turn % len(holders)]:  # copies are the same; who writes which is shared out
                    boxes[key] = box, shard.shape
        if boxes:
            write_boxes(folder, rank, {key: state.tensors[key] for key in boxes}, boxes)
        local.leave()

    def load_share(self, folder: Path) -> None:
        """Continue from a checkpoint, where weights live; `publish` brings them to the other placements.

        Raises `CheckpointError` where it is of another model or cannot be read.
        """
        local, rank = self._locals.get(self.home), self.home.mesh.rank_of(self.world.device)
        whole = read_state(folder)
        self.is_mixed = any(key.startswith(AVERAGE) for key in whole.tensors)
        if local is None or rank is None:
            return
        boxes = boxes_of(self.home.layout, shard_table(local.model.config, local.model.head_kind), rank)

        def part(key: str, shape: tuple[int, ...]) -> Box:
            return boxes[_parameter_of(key)] if shape else ()

        local.load_state(read_state(folder, part))
        local.leave()

    def fixed_weights(self) -> dict[str, torch.Tensor]:
        """As `LocalRole.fixed_weights`, of the whole model as it is opened: nothing is gathered."""
        if self.is_mixed:
            return {}
        model = self._open_model()
        return {name: p for name, p in model.named_parameters() if not self._trains(name, model)}

    def _trains(self, name: str, model: Decoder) -> bool:
        return "train" in self.placements and is_trained(name, self._config, model.head_kind)

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
        dtype = dtype_of(model)
        frozen = gather_facts(self._frozen(), peers)
        leave_out = sorted({name for names in frozen for name in names or ()})
        moving = plan(self.home, target, table, dtypes=Dtypes(source=dtype, target=dtype), leave_out=leave_out)
        site = self._site(peers.group)
        reallocation = Reallocation(moving, table, site)
        reallocation.agree()
        return Move(reallocation=reallocation, target=target, peers=peers)

    def _site(self, group: dist.ProcessGroup | None = None) -> Site:
        where = device_for_run().type
        return Site(device=self.world.device, ranks=self.world.ranks, group=group, torch_device=where)

    def _refuse_offload(self) -> None:
        """Placements may have parameters in common, which one would take from under the other."""
        if any(role.offload is not None for role in self._locals.values()):
            raise ConfigError(
                f"`plan.{self.name}.offload` is for roles with one placement, and this one moves between several; "
                "leave it out, or give all calls of the role the same mesh and layout"
            )

    def _frozen(self) -> list[str] | None:
        """Parameters that training leaves as they are; None where this process does not train."""
        role = self._locals.get(self.home)
        return None if role is None else [n for n, p in role.model.named_parameters() if not p.requires_grad]

    def _parameters(self, placement: Placement) -> dict[str, torch.Tensor]:
        role = self._locals.get(placement)
        if role is not None:
            role.come()
        return {} if role is None else {name: p.detach() for name, p in role.model.named_parameters()}

    def _settle_version(self, move: Move) -> None:
        trainer = self._locals.get(self.home)
        versions = gather_facts(None if trainer is None else trainer.version, move.peers)
        known = {version for version in versions if version is not None}
        if len(known) != 1:
            raise ReallocationError(f"the {self.name}'s ranks have weights of versions {sorted(known)}")
        if move.target in self._locals:
            self._locals[move.target].trainer.version = known.pop()


def _add(metrics: dict[str, float], key: str, value: float) -> None:
    metrics[key] = metrics.get(key, 0.0) + value


def _bind(model: Decoder, shards: Mapping[str, torch.Tensor]) -> None:
    """Let parameters whose memory is that of where they are trained be that tensor."""
    for name, parameter in model.named_parameters():
        if name in shards and shards[name].data_ptr() != parameter.data_ptr():
            parameter.data = shards[name]


def _parameter_of(key: str) -> str:
    """`exp_avg/layers.0.mlp.up.weight` is of `layers.0.mlp.up.weight`."""
    return key.partition("/")[2]


class Everywhere:
    """A role whose calls every process makes, and gets the outcomes of, whoever takes part in them.

    It is for what a run does beside the calls of its graph: samples, held-out rows, and saving.
    """

    def __init__(self, role: SpreadRole) -> None:
        self.role = role

    def generate(self, task: Any, batch: Batch) -> Outcome:
        """See `LocalRole`."""
        return self._shared("generate", lambda: self.role.generate(task, batch))

    def infer(self, task: Any, batch: Batch) -> Outcome:
        """See `LocalRole`."""
        return self._shared("infer", lambda: self.role.infer(task, batch))

    def leave(self) -> None:
        """See `SpreadRole`."""
        self.role.leave()

    def whole(self) -> Decoder | None:
        """See `SpreadRole`."""
        return self.role.whole()

    def fixed_weights(self) -> dict[str, torch.Tensor]:
        """See `SpreadRole`; in process 0, which keeps account of them, and empty in the others."""
        return self.role.fixed_weights() if self.role.world.rank == 0 else {}

    def _shared(self, kind: Kind, run: Callable[[], Outcome]) -> Outcome:
        world, members = self.role.world, self.role.members(kind)
        if world.rank not in members:
            return world.receive(members[0], 0)
        outcome = run()
        if world.rank == members[0]:
            world.send(outcome, sorted(set(world.ranks.values()) - set(members)), 0)
            world.finish()
        return outcome
