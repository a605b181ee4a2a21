"""A process of a plan puts its part of a model on its device and no more, when it opens and when it saves."""

import pytest
import torch
import torch.distributed as dist
from gang import run_gang
from tiny_families import family_model
from torch.utils._python_dispatch import TorchDispatchMode

from meshift.config.sections import TrainableConfig
from meshift.layout.boxes import boxes_of, shape_of
from meshift.layout.layout import Placement
from meshift.layout.mesh import Device
from meshift.models.hf.load import load_model
from meshift.models.hf.save import save_model
from meshift.models.shards import shard_table
from meshift.realloc.execute import Site
from meshift.runtime import models, spread_role
from meshift.runtime.role import LocalRole
from meshift.runtime.role_spec import RoleSpec
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.whole_model import put_together
from meshift.runtime.world import World

META = torch.device("meta")
"""Stands for a device here: what is moved to it has a shape and takes no memory."""
LAYOUTS = ("d1t2p1", "d1t1p2", "d2t1p1s", "d2t1p1")


class Arrivals(TorchDispatchMode):
    """Bytes of the tensors that are made on the device."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device == META and func.overloadpacket in MAKE:
            self.sizes.append(found.nbytes)
        return found


MAKE = {torch.ops.aten._to_copy, torch.ops.aten.new_empty, torch.ops.aten.clone, torch.ops.aten.empty_like}


def world_of(rank):
    ranks = {Device(index=i): i for i in range(2)}
    return World(rank=rank, ranks=ranks, group=dist.new_group([0, 1], backend="gloo"))


def check_opening(rank, folder):
    world, num_opened = world_of(rank), 0
    config = TrainableConfig()
    spec = RoleSpec(
        name="critic", model=str(folder), dtype=torch.float32, config=config, head="value", zero_head=True
    )

    def opened():
        nonlocal num_opened
        num_opened += 1
        model = spec.open_model(to_cut=True)
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        return model

    spread_role.device_for_run = models.device_for_run = lambda: META
    for text in LAYOUTS:
        placement = Placement.parse("0-1", text)
        with Arrivals() as arrivals:
            role = SpreadRole("critic", {"infer": placement}, world, opened, spec.make)
        model = role._locals[placement].model
        table = shard_table(model.config, "value")
        boxes = boxes_of(placement.layout, table, rank)
        assert {p.device for p in model.parameters()} == {META}
        assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
            n: shape_of(b) for n, b in boxes.items()
        }
        own = sum(parameter.nbytes for parameter in model.parameters())
        if placement.layout.sharded:  # a whole parameter is made and freed, for what is brought together later
            assert max(arrivals.sizes) <= max(4 * shard.num_elements for shard in table.values())
        else:
            assert sum(arrivals.sizes) == own
    assert num_opened == len(LAYOUTS)


@pytest.mark.parametrize("name", ["llama-biases", "gpt2"])
def test_a_model_larger_than_a_device_could_not_be_opened_in_parts(tmp_path, name):
    save_model(family_model(name), tmp_path / "model")
    run_gang(2, check_opening, tmp_path, tmp_path / "model")


def check_saving(rank, folder):
    world, home = world_of(rank), Placement.parse("1,0", "t2")

    def make(model, place, trainable):
        return LocalRole("actor", model, TrainableConfig(), trainable=trainable, place=place)

    def opened():
        return load_model(folder, mapped=True)

    role = SpreadRole("actor", {"train": home}, world, opened, make)
    expected = dict(load_model(folder).named_parameters())
    with torch.no_grad():
        for parameter in (*role._locals[home].model.parameters(), *expected.values()):
            parameter.mul_(2)
    found, other = role.whole(), opened()
    site = Site(device=world.device, ranks=world.ranks)
    held = {name: p.detach() for name, p in role._locals[home].model.named_parameters()}
    put_together(other, held, home, Placement.parse("0", "d1"), site, max_bytes=5000)
    assert (found is not None) == (rank == 0)
    for model in () if found is None else (found, other):
        assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_a_model_put_together_in_parts_would_be_another(tmp_path):
    save_model(family_model("llama-tied"), tmp_path / "model")
    run_gang(2, check_saving, tmp_path, tmp_path / "model")
