"""Adapters cut over tensor ranks, data ranks that share their state, and stages: the role of one device."""

import pytest
import torch
from adapted import adapted_model, adapters_in, with_lora
from gang import run_gang
from test_ranks import CONFIG, assert_role_agrees, place_in, story

from meshift.parallel.pipeline import cut_for
from meshift.runtime.role import LocalRole

LAYOUTS = ("d2t1p1", "d1t2p1", "d2t2p1", "d1t4p1", "d1t1p2", "d1t2p2", "d2t1p1s", "d4t1p1s", "d2t2p1s", "d2t1p2s")
TOGETHER = ("d2t2p1", "d1t4p1", "d1t2p2", "d4t1p1s", "d2t2p1s", "d2t1p2s")
"""Those in which the others are contained."""
CONFIG = with_lora(CONFIG.model_copy(update={"num_frozen_layers": 0}))


def role_of(name, place):
    model = adapted_model(name)
    model = model if place is None else cut_for(model, place)
    return LocalRole("actor", model, CONFIG, trainable=True, max_steps=3, place=place).can_generate(3, str)


def check_layouts(rank, name, layouts):
    expected = story(whole := role_of(name, None))
    first = adapted_model(name)
    for layout in layouts:
        place = place_in(layout, rank)
        if place is not None:
            assert_role_agrees(role_of(name, place), whole, expected, place, f"{name} {layout}")
    before = dict(first.named_parameters())
    moved = {n for n, w in whole.trainer.master_weights().items() if not torch.equal(w, before[n])}
    assert moved == set(adapters_in(before))


def test_adapters_would_learn_otherwise_where_they_are_cut(tmp_path):
    run_gang(4, check_layouts, tmp_path, "llama-one-kv-head", TOGETHER)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-one-kv-head", "olmo2", "gpt2"])
def test_adapters_would_learn_otherwise_in_any_layout(name, tmp_path):
    run_gang(4, check_layouts, tmp_path, name, LAYOUTS)
