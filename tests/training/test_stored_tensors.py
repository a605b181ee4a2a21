"""A checkpoint's tensors come back, whole or in boxes, from whichever files have them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshift.errors import CheckpointError
from meshift.layout.boxes import boxes_of, cells_of
from meshift.layout.layout import Layout
from meshift.layout.shard import Shard, Split
from meshift.training.checkpoint import State, read_state, write_state, write_values
from meshift.training.stored_tensors import StoredTensors, write_boxes

LAYOUTS = ["d1t1p1", "d2t1p1", "d1t2p1", "d2t3p1", "d3t1p1s", "d2t2p1s"]


def table(num_rows, num_columns):
    rows, columns = (
        Split(dim=dim, unit=1, num_units=size, group="mlp_columns")
        for dim, size in ((0, num_rows), (1, num_columns))
    )
    return {
        "rows": Shard(shape=(num_rows, 5), split=rows, stage="layer", layer=0),
        "columns": Shard(shape=(4, num_columns), split=columns, stage="layer", layer=0),
        "vector": Shard(shape=(7,), split=None, stage="layer", layer=0),
    }


def tensors_of(shards):
    return {
        f"exp_avg/{name}": torch.arange(shard.num_elements, dtype=torch.float32).view(shard.shape)
        for name, shard in shards.items()
    }


def write_by(layout, shards, tensors, folder):
    """Every box by the last rank that has it."""
    folder.mkdir()
    write_values(folder, {"n": 1})
    own = [{} for _ in range(layout.num_ranks)]
    for name, shard in shards.items():
        for box, ranks in cells_of(shard, layout, [0]).items():
            own[ranks[-1]][f"exp_avg/{name}"] = (box, shard.shape)
    for rank, boxes in enumerate(own):
        cut = {key: tensors[key][tuple(slice(*i) for i in box)] for key, (box, _) in boxes.items()}
        if boxes:
            write_boxes(folder, rank, cut, boxes)


@settings(max_examples=40, deadline=None)
@given(
    written=st.sampled_from(LAYOUTS),
    read=st.sampled_from(LAYOUTS),
    sizes=st.tuples(st.integers(3, 9), st.integers(3, 9)),
)
def test_another_layout_would_read_other_numbers(tmp_path_factory, written, read, sizes):
    folder, shards = tmp_path_factory.mktemp("state") / "actor", table(*sizes)
    tensors = tensors_of(shards)
    write_by(Layout.parse(written), shards, tensors, folder)
    for name, found in read_state(folder).tensors.items():
        assert found.equal(tensors[name])
    layout = Layout.parse(read)
    for rank in range(layout.num_ranks):
        boxes = boxes_of(layout, shards, rank)
        found = read_state(folder, lambda key, shape, boxes=boxes: boxes[key.partition("/")[2]]).tensors
        for name, box in boxes.items():
            expected = tensors[f"exp_avg/{name}"][tuple(slice(*i) for i in box)]
            assert found[f"exp_avg/{name}"].equal(expected)
            assert found[f"exp_avg/{name}"].shape == expected.shape


def test_what_one_process_wrote_would_not_be_cut(tmp_path):
    whole = {"master/w": torch.arange(12.0).view(4, 3), "step/w": torch.tensor(3.0)}
    write_state(tmp_path / "s", State(tensors=whole, values={"version": 2}))
    state = read_state(tmp_path / "s", lambda key, shape: ((1, 3), (0, 2)) if shape else ())
    assert state.values == {"version": 2}
    assert state.tensors["master/w"].tolist() == [[3, 4], [6, 7]]
    assert float(state.tensors["step/w"]) == 3.0
    assert "master/v" not in state.tensors
    assert set(state.tensors) == set(whole)


def test_a_missing_file_would_be_read_as_noise(tmp_path):
    shards = table(8, 6)
    write_by(Layout.parse("d1t2p1"), shards, tensors_of(shards), tmp_path / "s")
    (tmp_path / "s" / "state-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has 20 of the 40 numbers of exp_avg/rows that are wanted: a file"):
        StoredTensors(tmp_path / "s")["exp_avg/rows"]


def test_a_torn_file_would_be_read(tmp_path):
    shards = table(8, 6)
    write_by(Layout.parse("d1t2p1"), shards, tensors_of(shards), tmp_path / "s")
    file = tmp_path / "s" / "state-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"state-00001\.safetensors cannot be read"):
        StoredTensors(tmp_path / "s")
