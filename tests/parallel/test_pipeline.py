"""Stages of a pipeline together give one device's readings, tokens, updates and troubles."""

import math

import pytest
import torch
from gang import Cases, run_gang
from test_ranks import (
    CONFIG,
    READING,
    TASK,
    assert_batches_agree,
    assert_role_agrees,
    assert_trouble_is_heard,
    prompts,
    rollouts,
    story,
)
from tiny_families import MODELS, family_model

from meshift.algorithms.losses import PolicyLoss
from meshift.errors import LayoutError, NonFiniteError
from meshift.generation.params import SamplingParams
from meshift.generation.rollout import SamplingTask
from meshift.layout.boxes import boxes_of
from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Device, Mesh
from meshift.models.shards import shard_table
from meshift.parallel import groups, pipeline
from meshift.parallel.groups import join
from meshift.parallel.pipeline import cut_for, keep_stage
from meshift.runtime.role import LocalRole
from meshift.training.engine import TrainTask

LAYOUTS = ("d1t1p2", "d1t1p4", "d2t1p2", "d1t2p2", "d1t1p3", "d2t1p2s")
GRID = ("llama-tied", "olmo2", "qwen3")
"""Tied embeddings on both ends, norms over all heads' columns, norms by head."""


def place_in(layout, rank, num_ranks=4):
    devices = [Device(index=i) for i in range(num_ranks)]
    layout = Layout.parse(layout)
    placement = Placement(mesh=Mesh.parse(f"0-{layout.num_ranks - 1}"), layout=layout)
    return join(placement, devices[rank], {device: i for i, device in enumerate(devices)})


def role_of(name, place, config=CONFIG, dtype=torch.float32, num_layers=5):
    model = family_model(name, num_layers=num_layers).to(dtype)
    model = model if place is None else cut_for(model, place)
    return LocalRole("actor", model, config, trainable=True, max_steps=3, place=place).can_generate(3, str)


def check_layouts(rank, name, layouts, config, num_ranks):
    expected = story(whole := role_of(name, None, config))
    table = shard_table(whole.model.config, "lm")
    for layout in layouts:
        place = place_in(layout, rank, num_ranks)
        if place is not None:
            role = role_of(name, place, config)
            assert_role_agrees(role, whole, expected, place, f"{name} {layout}")
            assert boxes_of(place.layout, table, place.rank).keys() == dict(role.model.named_parameters()).keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID[1:])
def test_stages_of_other_families_are_the_role_on_one_device(name, tmp_path):
    run_gang(4, check_layouts, tmp_path, name, LAYOUTS, CONFIG, 4)


# What a stage has to learn: everything; its last layer only, below nothing; nothing at all in the first stages.
FROZEN = {"none": 0, "within a stage": 2, "a whole stage": 3}


def check_frozen(rank, num_frozen_layers):
    changes = {"num_frozen_layers": num_frozen_layers, "gradient_checkpointing": True, "learning_rate": 0.005}
    check_layouts(rank, "llama-tied", ("d1t1p2",), CONFIG.model_copy(update=changes), 2)


@pytest.mark.slow
def test_eight_processes(tmp_path):
    run_gang(
        8, check_layouts, tmp_path, "llama-tied", ("d2t2p2", "d1t2p4", "d4t1p2", "d2t1p4s", "d2t2p2s"), CONFIG, 8
    )


def check_one_order(rank):
    """As where a backend knows no tags, and messages between two processes of a group keep one order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "sends_in_one_order", lambda: True)
        for tag in ("FORWARD", "BACKWARD", "ASIDE"):
            patch.setattr(pipeline, tag, 1)
        place = place_in("d1t1p3", rank)
        assert place is None or place.pipeline.back is not place.pipeline.group
        check_layouts(rank, "llama-tied", ("d1t1p3", "d1t1p2"), CONFIG, 4)


def check_families(rank):
    """Log-probs and tokens of every family, drawn with and without a support."""
    plain = SamplingTask(params=SamplingParams(max_new_tokens=7, min_new_tokens=2, stop_token_ids=(4,)), seed=3)
    cut = SamplingTask(params=SamplingParams(max_new_tokens=5, temperature=0.8, top_k=9), seed=5)
    for name in MODELS:
        whole, role = (role_of(name, place, num_layers=3) for place in (None, place_in("d1t1p2", rank, 2)))
        assert_batches_agree(role.infer(READING, rollouts()).batch, whole.infer(READING, rollouts()).batch, name)
        for task in (plain, cut):
            ours, theirs = (r.generate(task, prompts()).batch for r in (role, whole))
            assert_batches_agree(ours, theirs, name)


def check_bfloat16(rank):
    """The kernels' paths: their memory is in use by several micro-batches at a time."""
    task = TrainTask(loss=PolicyLoss(reading=READING))
    for name in ("qwen2", "llama-tied"):
        whole, role = (role_of(name, p, dtype=torch.bfloat16) for p in (None, place_in("d1t1p2", rank, 2)))
        norms = [r.train(task, rollouts(), step=0).metrics["actor/grad_norm"] for r in (role, whole)]
        assert math.isclose(*norms, rel_tol=0.02), norms
        weights = whole.master_weights()
        for parameter, weight in role.master_weights().items():
            torch.testing.assert_close(weight, weights[parameter], atol=2e-3, rtol=1e-2, msg=parameter)
        ours, theirs = (
            r.generate(SamplingTask(params=SamplingParams(max_new_tokens=9), seed=1), prompts()).batch
            for r in (role, whole)
        )
        agree = (ours["tokens"].values == theirs["tokens"].values).float().mean()
        assert agree > 0.5, agree


def check_trouble(rank):
    assert_trouble_is_heard(role_of("llama-tied", place_in("d2t1p2", rank)))


def check_bad_logits(rank, top_k):
    params = SamplingParams(max_new_tokens=3, top_k=top_k)
    role = role_of("llama-tied", place_in("d2t1p2", rank))
    if role.model.ends:
        role.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="sequence 1"):
        role.generate(SamplingTask(params=params, seed=1), prompts())


def check_few(rank):
    """One row, and fewer sequences than stages: some have nothing to do."""
    whole, role = (role_of("qwen2", place) for place in (None, place_in("d2t1p2", rank)))
    one = rollouts().index([2])
    found, expected = (r.train(TASK, one, step=0).metrics for r in (role, whole))
    assert math.isclose(found["actor/grad_norm"], expected["actor/grad_norm"], rel_tol=1e-4)
    assert_batches_agree(role.infer(READING, one).batch, whole.infer(READING, one).batch, "one row")
    task = SamplingTask(params=SamplingParams(max_new_tokens=4), seed=2)
    for rows in ([0], [0, 2, 3]):
        ours, theirs = (r.generate(task, prompts().index(rows)).batch for r in (role, whole))
        assert_batches_agree(ours, theirs, f"prompts {rows}")


TOP_K = (0, 3)
OF_FOUR = {
    "layouts": (check_layouts, GRID[0], LAYOUTS, CONFIG, 4),
    "one order": (check_one_order,),
    "trouble": (check_trouble,),
    **{f"bad logits: {top_k}": (check_bad_logits, top_k) for top_k in TOP_K},
    "few": (check_few,),
}
OF_TWO = {
    **{f"frozen: {case}": (check_frozen, num_layers) for case, num_layers in FROZEN.items()},
    "families": (check_families,),
    "bfloat16": (check_bfloat16,),
}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return Cases(4, tmp_path_factory.mktemp("four"), OF_FOUR)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return Cases(2, tmp_path_factory.mktemp("two"), OF_TWO)


def test_stages_together_are_the_role_on_one_device(four):
    four.check("layouts")


@pytest.mark.parametrize("case", FROZEN)
def test_gradients_go_back_as_far_as_something_is_learned(two, case):
    two.check(f"frozen: {case}")


def test_stages_would_need_tags(four):
    four.check("one order")


def test_every_family_reads_and_draws_through_stages(two):
    two.check("families")


def test_stages_in_bfloat16(two):
    two.check("bfloat16")


def test_every_stage_hears_of_a_loss_that_is_no_number(four):
    four.check("trouble")


@pytest.mark.parametrize("top_k", TOP_K)
def test_every_stage_hears_of_logits_that_are_no_numbers(four, top_k):
    four.check(f"bad logits: {top_k}")


def test_fewer_rows_than_stages(four):
    four.check("few")


def test_a_stage_keeps_the_names_and_the_shapes_of_its_parameters():
    layout, num_layers = Layout.parse("p3"), 5
    whole = family_model("llama-tied", num_layers=num_layers)
    shapes = {name: p.shape for name, p in whole.named_parameters()}
    table = shard_table(whole.config, "lm")
    for stage in range(3):
        part = keep_stage(family_model("llama-tied", num_layers=num_layers), layout, stage)
        found = {name: p.shape for name, p in part.named_parameters()}
        assert found == {name: shapes[name] for name in boxes_of(layout, table, stage)}
        assert ("embedding.weight" in found) == (stage != 1)
        assert (part.embeds, part.ends) == (stage == 0, stage == 2)


def test_more_stages_than_layers_are_refused():
    with pytest.raises(LayoutError, match="more pipeline stages than the model has layers"):
        keep_stage(family_model("qwen2", num_layers=2), Layout.parse("p3"), 0)
