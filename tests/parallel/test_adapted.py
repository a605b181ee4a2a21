"""Adapters cut over tensor ranks, data ranks that share their state, and stages: the role of one device."""

import math

import pytest
import torch
from adapted import adapted_model, adapters_in, with_lora
from gang import run_gang
from test_ranks import CONFIG, assert_batches_agree, place_in, story

from meshift.layout.boxes import boxes_of
from meshift.models.shards import shard_table
from meshift.parallel.pipeline import cut_for
from meshift.runtime.role import LocalRole

LAYOUTS = ("d2t1p1", "d1t2p1", "d2t2p1", "d1t4p1", "d1t1p2", "d1t2p2", "d2t1p1s", "d4t1p1s", "d2t2p1s", "d2t1p2s")
CONFIG = with_lora(CONFIG.model_copy(update={"num_frozen_layers": 0}))


def role_of(name, place):
    model = adapted_model(name)
    model = model if place is None else cut_for(model, place)
    return LocalRole("actor", model, CONFIG, trainable=True, max_steps=3, place=place).can_generate(3, str)


def check_layouts(rank, name):
    expected = story(whole := role_of(name, None))
    table = shard_table(whole.model.config, "lm")
    first = adapted_model(name)
    for layout in LAYOUTS:
        place = place_in(layout, rank)
        if place is None:
            continue
        ours = story(role := role_of(name, place))
        for one, other in zip((ours[0], ours[1], ours[3]), (expected[0], expected[1], expected[3]), strict=True):
            assert_batches_agree(one, other, f"{name} {layout}")
        for one, other in zip(ours[2], expected[2], strict=True):
            wrong = {
                k: (one[k], other[k])
                for k in other
                if not math.isclose(one[k], other[k], rel_tol=1e-4, abs_tol=1e-5)
            }
            assert not wrong, (layout, wrong)
        weights, boxes = whole.trainer.master_weights(), boxes_of(place.layout, table, place.rank)
        for parameter, weight in role.trainer.master_weights().items():
            part = weights[parameter][tuple(slice(*interval) for interval in boxes[parameter])]
            torch.testing.assert_close(weight, part, atol=1e-5, rtol=1e-5, msg=f"{name} {layout}: {parameter}")
    before = dict(first.named_parameters())
    moved = {n for n, w in whole.trainer.master_weights().items() if not torch.equal(w, before[n])}
    assert moved == set(adapters_in(before))


@pytest.mark.parametrize(
    "name", ["llama-one-kv-head", *(pytest.param(name, marks=pytest.mark.slow) for name in ("olmo2", "gpt2"))]
)
def test_adapters_would_learn_otherwise_where_they_are_cut(name, tmp_path):
    run_gang(4, check_layouts, tmp_path, name)
