"""Boxes: what the ranks of a layout hold, against torch's own chunks and against a count of every element."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_tables import family_table, layouts, random_tables

from meshift.errors import LayoutError
from meshift.layout.boxes import boxes_of, cells_of, count_layers, cut_box, num_elements, shape_of, stages_of
from meshift.layout.layout import Layout
from meshift.layout.shard import Shard, Split
from meshift.models.hf.families import FAMILIES

GRID = ["d1t1p1", "d2t2p2", "d3t4p1", "d2t5p3s", "d4t3p1s", "d1t6p5", "d7t1p1s"]


def counts(layout, shards):
    """How many ranks hold each element of each parameter."""
    found = {name: np.zeros(shard.shape, int) for name, shard in shards.items()}
    for rank in range(layout.num_ranks):
        for name, box in boxes_of(layout, shards, rank).items():
            found[name][tuple(slice(*interval) for interval in box)] += 1
    return found


@pytest.mark.parametrize("text", GRID)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("head", ["lm", "value"])
def test_every_family_is_covered_as_often_as_data_ranks_and_replicas_say(name, head, text):
    layout, shards = Layout.parse(text), family_table(name, head)
    for parameter, count in counts(layout, shards).items():
        shard = shards[parameter]
        copies = 1 if layout.sharded else layout.data
        copies *= 1 if shard.split is not None else layout.tensor
        copies *= 2 if shard.tied and layout.pipeline > 1 else 1
        if shard.split is not None and shard.split.group == "kv_heads" and layout.tensor > shard.split.num_units:
            assert count.min() == copies * (layout.tensor // shard.split.num_units), parameter
            assert count.max() == copies * -(-layout.tensor // shard.split.num_units), parameter
        else:
            assert (count == copies).all(), parameter


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), shards=random_tables())
def test_boxes_of_a_parameter_are_equal_or_disjoint_and_cover_it(data, shards):
    layout = data.draw(layouts(shards))
    for name, shard in shards.items():
        stages = stages_of(shard, layout, count_layers(shards))
        cells = cells_of(shard, layout, stages)
        held = {rank: boxes_of(layout, shards, rank).get(name) for rank in range(layout.num_ranks)}
        assert {rank: box for rank, box in held.items() if box and num_elements(box)} == {
            rank: box for box, ranks in cells.items() for rank in ranks
        }
        assert sum(num_elements(box) for box in cells) == shard.num_elements
        once = np.zeros(shard.shape, int)
        for box in cells:
            once[tuple(slice(*interval) for interval in box)] += 1
        assert (once == 1).all()


@given(rows=st.integers(1, 30), columns=st.integers(1, 4), data=st.integers(1, 12))
def test_data_ranks_have_the_chunks_that_fsdp2_takes_from_torch(rows, columns, data):
    shards = {"head.weight": Shard(shape=(rows, columns), split=None, stage="head")}
    chunks = torch.arange(rows * columns).view(rows, columns).chunk(data)
    whole = torch.arange(rows * columns).view(rows, columns)
    for rank in range(data):
        (start, stop), _ = boxes_of(Layout(data=data, sharded=True), shards, rank)["head.weight"]
        expected = chunks[rank] if rank < len(chunks) else whole[:0]
        assert torch.equal(whole[start:stop], expected)


def test_data_ranks_cut_the_rows_that_their_tensor_rank_has():
    split = Split(dim=0, unit=1, num_units=10, group="mlp_columns")
    shards = {"up": Shard(shape=(10, 2), split=split, stage="head")}
    layout = Layout(data=2, tensor=2, sharded=True)
    rows = [boxes_of(layout, shards, rank)["up"][0] for rank in range(4)]
    assert rows == [(0, 3), (5, 8), (3, 5), (8, 10)]


def test_a_tied_embedding_is_on_the_first_and_the_last_stage_and_nowhere_else():
    shards, layout = family_table("llama", tie_word_embeddings=True), Layout(pipeline=3)
    assert ["embedding.weight" in boxes_of(layout, shards, rank) for rank in range(3)] == [True, False, True]
    assert "head.weight" not in shards
    untied = family_table("llama", tie_word_embeddings=False)
    assert ["embedding.weight" in boxes_of(layout, untied, rank) for rank in range(3)] == [True, False, False]
    assert ["head.weight" in boxes_of(layout, untied, rank) for rank in range(3)] == [False, False, True]


def test_a_model_with_fewer_heads_than_tensor_ranks_is_refused_with_the_fix():
    with pytest.raises(LayoutError, match="6 query heads cannot be cut into 8 parts; use t6 or less"):
        boxes_of(Layout(tensor=8), family_table("llama"), 0)


def test_a_model_with_fewer_layers_than_stages_is_refused_with_the_fix():
    with pytest.raises(LayoutError, match="use p5 or less"):
        boxes_of(Layout(pipeline=6), family_table("llama"), 0)


@given(data=st.data(), most=st.integers(1, 40))
def test_a_box_is_cut_into_boxes_under_the_bound_that_follow_one_another(data, most):
    starts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    box = tuple((start, start + data.draw(st.integers(1, 6))) for start in starts)
    whole = np.arange(num_elements(box)).reshape(shape_of(box))
    parts = list(cut_box(box, most))
    assert all(0 < num_elements(part) <= most for part in parts)
    pieces = [
        whole[tuple(slice(a - start, b - start) for (a, b), start in zip(part, starts, strict=True))].ravel()
        for part in parts
    ]
    assert np.concatenate(pieces).tolist() == list(range(whole.size))
    assert len(parts) >= -(-whole.size // most)
