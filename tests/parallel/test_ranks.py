"""Data and tensor ranks together give one device's readings, updates, statistics and troubles."""

import math
from dataclasses import replace

import pytest
import torch
from gang import Cases
from tiny_families import family_model
from tiny_rl import random_rollout

from meshift.algorithms.losses import PolicyLoss
from meshift.batch import Batch, Ragged
from meshift.config.sections import TrainableConfig
from meshift.errors import NonFiniteError
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.layout.boxes import boxes_of
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Device, Mesh
from meshift.models.shards import shard_table
from meshift.parallel.groups import join
from meshift.parallel.tensor import cut_model
from meshift.runtime.role import LocalRole
from meshift.training.engine import TrainTask
from meshift.training.readings import TokenLogprobs

LAYOUTS = ("d2t1p1", "d1t2p1", "d4t1p1", "d2t2p1", "d1t4p1", "d3t1p1", "d2t1p1s", "d2t2p1s")
TOGETHER = ("d2t2p1", "d1t4p1", "d3t1p1", "d2t2p1s")
"""Those in which the others are contained."""
MODELS = {"llama-biases": LAYOUTS, "olmo2": TOGETHER, "qwen3": TOGETHER}
CONFIG = TrainableConfig(
    learning_rate=0.02,
    adam_epsilon=1e-3,  # Adam magnifies the rounding of a gradient that is all rounding
    max_grad_norm=0.05,
    weight_decay=0.1,
    num_frozen_layers=1,
    max_tokens_per_micro_batch=20,
)
READING = TokenLogprobs(with_entropy=True)
TASK = TrainTask(loss=PolicyLoss(reading=READING), num_epochs=2, num_mini_batches=3)
SAMPLING = SamplingTask(params=SamplingParams(max_new_tokens=5, temperature=0.8, top_p=0.9), seed=5)


def place_in(layout, rank, num_devices=4, mesh=None):
    """Where a rank of the world stands in a layout on the first devices (or the mesh's), or None."""
    devices = [Device(index=i) for i in range(num_devices)]
    layout = Layout.parse(layout)
    placement = Placement(mesh=Mesh.parse(mesh or f"0-{layout.num_ranks - 1}"), layout=layout)
    return join(placement, devices[rank], {device: i for i, device in enumerate(devices)})


def role_of(name, place, config=CONFIG, dtype=torch.float32, **options):
    model = family_model(name, **options).to(dtype)
    model = model if place is None else cut_model(model, place.tensor)
    return LocalRole("actor", model, config, trainable=True, max_steps=3, place=place).can_generate(3, str)


def rollouts(seed=0):
    return random_rollout(7, vocab_size=61, seed=seed)


def prompts():
    rows = [[3, 1, 4], [3, 1, 4], [9, 2], [5], [8, 8, 8]]
    index = Ragged.scalars(list(range(10, 15)), torch.int64)
    return Batch({"prompts": Ragged.from_rows(rows, torch.int64), "index": index})


def story(role):
    """What a role gives through generation, reading and two steps of training, of six updates each."""
    drawn = role.generate(SAMPLING, prompts()).batch
    read = role.infer(READING, rollouts()).batch
    metrics = [role.train(TASK, rollouts(step), step=step).metrics for step in range(2)]
    return drawn, read, metrics, role.infer(READING, rollouts()).batch


def assert_batches_agree(ours, theirs, what):
    assert ours.fields.keys() == theirs.fields.keys()
    for key, field in theirs.fields.items():
        assert torch.equal(ours[key].lengths, field.lengths), what
        if field.values.is_floating_point():
            torch.testing.assert_close(ours[key].values, field.values, atol=2e-5, rtol=1e-5, msg=f"{what}: {key}")
        else:
            assert torch.equal(ours[key].values, field.values), f"{what}: {key}"


def assert_role_agrees(role, whole, expected, place, what):
    """A part of a role has the story of the `whole` one, does its operations, and ends with its weights."""
    ours = story(role)
    for one, other in zip((ours[0], ours[1], ours[3]), (expected[0], expected[1], expected[3]), strict=True):
        assert_batches_agree(one, other, what)
    for one, other in zip(ours[2], expected[2], strict=True):
        assert one.keys() == other.keys()
        wrong = {
            k: (one[k], other[k]) for k in one if not math.isclose(one[k], other[k], rel_tol=1e-4, abs_tol=1e-5)
        }
        assert not wrong, (what, wrong)
    assert role.work.flops == pytest.approx(whole.work.flops), what
    boxes = boxes_of(place.layout, shard_table(whole.model.config, "lm"), place.rank)
    weights = whole.trainer.master_weights()
    for parameter, weight in role.trainer.master_weights().items():
        part = weights[parameter][tuple(slice(*interval) for interval in boxes[parameter])]
        torch.testing.assert_close(weight, part, atol=1e-5, rtol=1e-5, msg=f"{what}: {parameter}")


def check_layouts(rank, name, layouts):
    expected = story(whole := role_of(name, None))
    for layout in layouts:
        place = place_in(layout, rank)
        if place is not None:
            assert_role_agrees(role_of(name, place), whole, expected, place, f"{name} {layout}")


def assert_trouble_is_heard(role):
    """A loss that is no number in one row stops all, and changes nothing."""
    batch = rollouts()
    bad = batch["advantages"].values.clone()
    bad[0] = math.nan
    batch = replace(batch, fields={**batch.fields, "advantages": Ragged(bad, batch["advantages"].lengths)})
    before = {name: weight.clone() for name, weight in role.master_weights().items()}
    with pytest.raises(NonFiniteError, match="the loss is nan in 1 of"):
        role.train(TrainTask(loss=PolicyLoss(reading=READING)), batch, step=0)
    assert all(torch.equal(weight, before[name]) for name, weight in role.master_weights().items())
    assert not any(m.grad is not None and m.grad.any() for m in role.trainer.optimizer.masters)


def check_trouble(rank):
    assert_trouble_is_heard(role_of("llama-tied", place_in("d2t2p1", rank)))


def check_bfloat16(rank):
    whole = role_of("qwen2", None, dtype=torch.bfloat16)
    task = TrainTask(loss=PolicyLoss(reading=READING))
    expected = whole.train(task, rollouts(), step=0)
    for layout in ("d2t1p1", "d1t2p1"):
        place = place_in(layout, rank)
        if place is None:
            continue
        ours = role_of("qwen2", place, dtype=torch.bfloat16)
        found = ours.train(task, rollouts(), step=0)
        room = 1e-4 if layout == "d2t1p1" else 0.05  # partial sums of tensor ranks are rounded to bfloat16
        norms = [one.metrics["actor/grad_norm"] for one in (found, expected)]
        assert math.isclose(*norms, rel_tol=room), (layout, norms)


def check_few_rows(rank):
    whole, ours = role_of("qwen2", None), role_of("qwen2", place_in("d4t1p1", rank))
    task = TrainTask(loss=PolicyLoss(reading=READING))
    two_rows = rollouts().index([0, 1])
    expected, found = whole.train(task, two_rows, step=0), ours.train(task, two_rows, step=0)
    assert math.isclose(found.metrics["actor/grad_norm"], expected.metrics["actor/grad_norm"], rel_tol=1e-4)
    for name, weight in whole.master_weights().items():
        torch.testing.assert_close(ours.master_weights()[name], weight, atol=1e-5, rtol=1e-5)
    assert_batches_agree(ours.infer(READING, two_rows).batch, whole.infer(READING, two_rows).batch, "two rows")


CASES = {
    **{f"layouts: {name}": (check_layouts, name, layouts) for name, layouts in MODELS.items()},
    "trouble": (check_trouble,),
    "bfloat16": (check_bfloat16,),
    "few rows": (check_few_rows,),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Cases(4, tmp_path_factory.mktemp("gang"), CASES)


@pytest.mark.parametrize("name", MODELS)
def test_a_role_on_many_ranks_is_the_role_on_one(ranks, name):
    ranks.check(f"layouts: {name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, layouts in MODELS.items() if layouts != LAYOUTS])
def test_a_role_in_every_layout_is_the_role_on_one(name, tmp_path):
    Cases(4, tmp_path, {name: (check_layouts, name, LAYOUTS)}).check(name)


def test_every_rank_hears_of_one_ranks_trouble(ranks):
    ranks.check("trouble")


def test_ranks_would_train_on_a_part_of_the_gradient_in_bfloat16(ranks):
    ranks.check("bfloat16")


def test_fewer_rows_than_ranks(ranks):
    ranks.check("few rows")
