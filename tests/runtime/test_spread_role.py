"""What stages write of a role, with an embedding that two of them hold: any other layout goes on from it."""

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
from meshift.runtime import role as role_module
from meshift.runtime.role import LocalRole
from meshift.runtime.spread_role import SpreadRole
from meshift.runtime.world import World
from meshift.training.checkpoint import read_state
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

CONFIG = TrainableConfig(learning_rate=0.01, adam_epsilon=1e-3, max_tokens_per_micro_batch=20)
TASK = TrainTask(loss=PolicyLoss(reading=TokenLogprobs(with_entropy=True)))


def make(model, place, trainable):
    return LocalRole("actor", model, CONFIG, trainable=trainable, max_steps=4, place=place)


def spread(world, mesh, layout):
    placements = {"train": Placement.parse(mesh, layout)}
    return SpreadRole("actor", placements, world, lambda: family_model("llama-tied"), make)


def check(rank, folder):
    devices = {Device(index=i): i for i in range(4)}
    world = World(rank=rank, ranks=devices, group=dist.new_group(list(range(4)), backend="gloo"))
    alone = make(family_model("llama-tied"), None, True)
    ours = spread(world, "0-3", "d2t1p2")
    rollouts = [random_rollout(6, vocab_size=61, seed=seed) for seed in range(2)]
    for role in (alone, ours):
        role.train(TASK, rollouts[0], step=0)
    if rank == 0:
        folder.mkdir()
    dist.barrier()
    ours.write_share(folder)
    dist.barrier()
    stored, expected = read_state(folder), alone.state()
    assert stored.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(stored.tensors[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    if rank == 0:  # boxes are written once each
        files = sum(file.stat().st_size for file in folder.glob("state-*.safetensors"))
        assert files < 1.2 * sum(tensor.nbytes for tensor in expected.tensors.values())
    alone.train(TASK, rollouts[1], step=1)
    for mesh, layout in (("0-1", "t2"), ("3,2,1,0", "d1t2p2"), ("0-2", "p3")):
        other = spread(world, mesh, layout)
        other.load_share(folder)
        if rank in other.members("train"):
            other.train(TASK, rollouts[1], step=1)
            boxes = boxes_of(
                other.home.layout, shard_table(alone.model.config, "lm"), other.home.mesh.rank_of(world.device)
            )
            for name, weight in other.master_weights().items():
                part = alone.master_weights()[name][tuple(slice(*interval) for interval in boxes[name])]
                torch.testing.assert_close(weight, part, atol=2e-5, rtol=1e-4, msg=f"{layout} {name}")


def test_another_layout_would_not_go_on_from_what_stages_wrote(tmp_path):
    run_gang(4, check, tmp_path, tmp_path / "state")


def check_that_it_leaves(rank, folder):
    """One process of a run by a plan, with roles that leave; a CPU's memory is taken for a device's."""
    role_module.pays_on = lambda device: True
    world = World(rank=rank, ranks={Device(index=0): 0})

    def role(name, kind, seed):
        def make(model, place, trainable):
            return LocalRole(name, model, CONFIG, trainable=trainable, max_steps=4, place=place, offload=True)

        placements = {kind: Placement.parse("0", "d1")}
        return SpreadRole(name, placements, world, lambda: family_model("llama-tied", seed=seed), make)

    actor, reference = role("actor", "train", 1), role("reference", "infer", 2)
    own, other = (one._locals[one.home].offload for one in (actor, reference))
    actor.train(TASK, random_rollout(6, vocab_size=61, seed=0), step=0)
    reference.prepare_mix(actor)
    reference.mix(actor, 0.25)
    assert own.is_away, "when its weights are mixed in"
    assert other.is_away, "when others are mixed into it"
    folder.mkdir()
    actor.write_share(folder)
    assert own.is_away, "after a checkpoint"
    actor.load_share(folder)
    assert own.is_away, "when it goes on from one"
    assert all(weight.untyped_storage().nbytes() > 0 for weight in actor.whole().parameters()), "to be saved"


def test_a_role_that_leaves_its_device_would_be_saved_empty_or_stay_there(tmp_path):
    run_gang(1, check_that_it_leaves, tmp_path, tmp_path / "state")
