"""Layouts and placements: writing, ranks and coordinates, pipeline stages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.errors import LayoutError
from meshift.layout.layout import Layout, Placement

LAYOUTS = st.builds(
    Layout,
    data=st.integers(1, 5),
    tensor=st.integers(1, 5),
    pipeline=st.integers(1, 5),
    sharded=st.booleans(),
)


@given(layout=LAYOUTS)
def test_a_layout_reads_back_as_it_was_written(layout):
    assert Layout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "written"),
    [("d2t4p1", "d2t4p1"), ("t4", "d1t4p1"), ("p2t3d5s", "d5t3p2s"), ("d8s", "d8t1p1s")],
)
def test_axes_may_be_left_out_and_come_in_any_order(text, written):
    assert str(Layout.parse(text)) == written


@pytest.mark.parametrize(
    "text", ["", "s", "d", "d2d2", "d2t4p1x", "D2t4p1", "d2 t4", "d-1", "sd2", "d2ss", "2", "d1e5"]
)
def test_what_is_no_layout_is_refused_with_an_example(text):
    with pytest.raises(LayoutError, match="as in `d2t4p1`"):
        Layout.parse(text)


def test_an_axis_of_no_rank_is_refused():
    with pytest.raises(LayoutError, match="`d2t0p1` has an axis without a rank"):
        Layout.parse("d2t0p1")


@given(layout=LAYOUTS)
def test_ranks_count_along_tensor_then_data_then_pipeline(layout):
    coordinates = [layout.coordinates(rank) for rank in range(layout.num_ranks)]
    counted = [
        (pipeline, data, tensor)
        for pipeline in range(layout.pipeline)
        for data in range(layout.data)
        for tensor in range(layout.tensor)
    ]
    assert [(c.pipeline, c.data, c.tensor) for c in coordinates] == counted
    assert [layout.rank(c) for c in coordinates] == list(range(layout.num_ranks))
    with pytest.raises(ValueError, match="no rank"):
        layout.coordinates(layout.num_ranks)


@given(num_layers=st.integers(1, 40), pipeline=st.integers(1, 40))
def test_stages_share_out_all_layers_evenly_or_are_refused(num_layers, pipeline):
    layout = Layout(pipeline=pipeline)
    if pipeline > num_layers:
        with pytest.raises(LayoutError, match=rf"use p{num_layers} or less"):
            layout.stage_layers(num_layers)
        return
    stages = layout.stage_layers(num_layers)
    assert [layer for layers in stages for layer in layers] == list(range(num_layers))
    sizes = [len(layers) for layers in stages]
    assert max(sizes) - min(sizes) <= 1
    assert sizes[-1] == min(sizes), "the last stage has the head, so it gets no layer more"


def test_a_placement_needs_as_many_devices_as_ranks():
    assert str(Placement.parse("0-7", "d2t4p1")) == "d2t4p1@0-7"
    with pytest.raises(LayoutError, match=r"d2t4p1 needs 8 devices, but the mesh `0-3` has 4"):
        Placement.parse("0-3", "d2t4p1")
