"""A role whose data ranks share out its state: checkpoints of any layout, the whole model, other placements."""

import pytest
import torch
import torch.distributed as dist
from gang import run_gang
from tiny_families import family_model
from tiny_rl import random_rollout

from meshift.algorithms.losses import PolicyLoss
from meshift.config.sections import TrainableConfig
from meshift.layout.boxes import boxes_of
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.models.shards import shard_table
from meshift.parallel.exchange import gather_facts
from meshift.runtime.role import LocalRole
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.world import World
from meshift.training.checkpoint import read_state, write_state
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

CONFIG = TrainableConfig(
    learning_rate=0.02,
    adam_epsilon=1e-3,  # Adam magnifies the rounding of a gradient that is all rounding
    num_frozen_layers=1,
    max_tokens_per_micro_batch=20,
)
TASK = TrainTask(loss=PolicyLoss(reading=TokenLogprobs()), num_mini_batches=2)
HOMES = {"d2t1p1s": "1,0", "d4t1p1s": "0-3", "d2t2p1s": "0-3", "d1t2p1": "2-3", "d1t1p1": "2"}
ELSEWHERE = Placement.parse("3,2", "d2t1p1s")


def rollouts(seed):
    return random_rollout(7, vocab_size=61, seed=seed)


def local_role(model, place=None, trainable=True):
    return LocalRole("actor", model, CONFIG, trainable=trainable, max_steps=9, place=place)


class Roles:
    """Roles of one world over four processes, with weights of a family in a type."""

    def __init__(self, rank, name, dtype):
        ranks = {Device(index=i): i for i in range(4)}
        self.world = World(rank=rank, ranks=ranks, group=dist.new_group(list(range(4))))
        self._model = lambda: family_model(name, dtype=dtype)
        self.table = shard_table(self._model().config, "lm")

    def alone(self):
        return local_role(self._model())

    def make(self, layout):
        placements = {"train": Placement.parse(HOMES[layout], layout), "infer": ELSEWHERE}
        return SpreadRole("actor", placements, self.world, self._model, local_role, CONFIG)

    def train(self, role, steps):
        if self.world.rank in role.members("train"):
            for step in steps:
                role.train(TASK, rollouts(step), step=step)
        role.publish()

    def write(self, role, folder):
        if self.world.rank == 0:
            folder.mkdir()
        self.wait()
        role.write_share(folder)
        self.wait()

    def load(self, layout, folder):
        role = self.make(layout)
        role.load_share(folder)
        role.publish()
        return role

    def wait(self):
        gather_facts(None, self.world.everybody)

    def check(self, role, tensors, dtype):
        """Every process's boxes, where it trains and elsewhere, have the bits of whole tensors."""
        for placement, local in role._locals.items():
            boxes = boxes_of(placement.layout, self.table, placement.mesh.rank_of(self.world.device))
            parts = {name: tuple(slice(*side) for side in box) for name, box in boxes.items()}
            for name, weight in local.model.named_parameters():
                expected = tensors.get(f"master/{name}", dict(self._model().named_parameters())[name].detach())
                assert torch.equal(weight.detach(), expected[parts[name]].to(dtype)), (placement, name)
            if placement == role.home:
                held = local.state().tensors
                assert set(held) == set(tensors)
                for key, tensor in held.items():
                    name = key.partition("/")[2]
                    expected = tensors[key][parts[name]] if tensor.dim() else tensors[key]
                    assert torch.equal(tensor, expected), key

    def check_whole(self, role, tensors, dtype):
        model = role.whole()
        assert (model is not None) == (self.world.rank == 0)
        if model is not None:
            for name, weight in model.named_parameters():
                if f"master/{name}" in tensors:
                    assert torch.equal(weight.detach(), tensors[f"master/{name}"].to(dtype)), name


def whole_tensors(folder):
    stored = read_state(folder).tensors
    return {name: stored[name] for name in stored}


def check_checkpoints(rank, folder, name, dtype):
    roles = Roles(rank, name, dtype)
    for first in ("d2t1p1s", "d2t2p1s"):
        role = roles.make(first)
        roles.train(role, range(2))
        roles.write(role, folder / first)
        tensors = whole_tensors(folder / first)
        roles.check(role, tensors, dtype)
        roles.check_whole(role, tensors, dtype)
        for then in HOMES:
            other = roles.load(then, folder / first)
            roles.check(other, tensors, dtype)
            roles.train(role if then == first else other, [2])
            roles.write(other, folder / f"{first} {then}")
            if then == first:  # the bits of what was not broken off
                roles.train(other, [2])
                for placement, local in role._locals.items():
                    ours = dict(other._locals[placement].model.named_parameters())
                    assert all(torch.equal(ours[n], w) for n, w in local.model.named_parameters())
        alone = roles.alone()
        alone.load_state(read_state(folder / first))
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in alone.state().tensors.items())


def check_from_one(rank, folder, name, dtype):
    roles = Roles(rank, name, dtype)
    alone = roles.alone()
    for step in range(2):
        alone.train(TASK, rollouts(step), step=step)
    if rank == 0:
        write_state(folder / "one", alone.state())
    roles.wait()
    tensors = whole_tensors(folder / "one")
    for then in ("d4t1p1s", "d2t2p1s"):
        role = roles.load(then, folder / "one")
        roles.check(role, tensors, dtype)
        roles.check_whole(role, tensors, dtype)
        roles.train(role, [2])
        roles.write(role, folder / then)
    alone.train(TASK, rollouts(2), step=2)
    room = 1e-5 if dtype == torch.float32 else 2e-3
    for key, tensor in alone.state().tensors.items():
        for then in ("d4t1p1s", "d2t2p1s"):
            ours = read_state(folder / then).tensors[key]
            if key.startswith("master/"):
                assert torch.allclose(ours, tensor, atol=room, rtol=room), (then, key)


@pytest.mark.parametrize(
    ("check", "dtype"),
    [
        (check_checkpoints, torch.bfloat16),
        (check_from_one, torch.float32),
        pytest.param(check_checkpoints, torch.float32, marks=pytest.mark.slow),
        pytest.param(check_from_one, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_would_be_of_one_layout(check, dtype, tmp_path):
    run_gang(4, check, tmp_path, tmp_path, "llama-tied", dtype)
