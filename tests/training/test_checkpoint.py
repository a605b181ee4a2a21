"""States on disk, and an optimizer that goes on from one exactly as if it had never stopped."""

import json

import pytest
import torch
from tiny_rl import tiny_model

from meshift.config.sections import TrainableConfig
from meshift.errors import CheckpointError
from meshift.training.checkpoint import State, fingerprint, read_state, restore_tensor, write_state
from meshift.training.engine import TrainingEngine

CONFIG = TrainableConfig(weight_decay=0.1, max_grad_norm=0.5)


def test_tensors_and_floats_come_back_as_the_same_bits(tmp_path):
    tensors = {
        "a": torch.tensor([1.0, -0.0, 1e-45, float("inf")]),
        "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).T,
        "step": torch.tensor(3.0),
        "c": torch.tensor(0.1, dtype=torch.float64),
    }
    values = {"x": 0.1 + 0.2, "tiny": 5e-324, "n": 2**60, "deep": {"y": [1e-310]}}
    write_state(tmp_path / "s", State(tensors=tensors, values=values))
    state = read_state(tmp_path / "s")
    assert state.values == values
    for name, tensor in tensors.items():
        read = state.tensors[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert read.contiguous().reshape(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
        )


def test_a_state_without_tensors_needs_no_file_of_them(tmp_path):
    write_state(tmp_path / "s", State(values={"n": 1}))
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["state.json"]
    assert read_state(tmp_path / "s").tensors == {}
    assert json.loads((tmp_path / "s" / "state.json").read_text()) == {"n": 1}


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", None])
def test_a_state_that_cannot_be_read_is_a_sentence(tmp_path, name, content):
    """It was whole when the run looked; another process, or the disk, can have been at it since."""
    write_state(tmp_path / "s", State(tensors={"a": torch.ones(3)}, values={}))
    if content is None and name == "state.json":
        (tmp_path / "s" / name).unlink()
    else:
        (tmp_path / "s" / name).write_bytes(content or b"\0" * 16)
    with pytest.raises(CheckpointError, match="s cannot be read"):
        read_state(tmp_path / "s")


def update(engine, seed, *, leave_out=None):
    """One step with random gradients, summed over two backward passes as over micro-batches."""
    for part in (0, 1):
        draw = torch.Generator().manual_seed(10 * seed + part)
        named = dict(engine.model.named_parameters())
        terms = [
            (p.float() * torch.randn(p.shape, generator=draw)).sum()
            for name, p in named.items()
            if p.requires_grad and name != leave_out
        ]
        sum(terms).backward()
    engine.optimizer.step(1e-2)
    engine.version += 1


def same(one, two):
    weights = [dict(engine.model.named_parameters()) for engine in (one, two)]
    states = [engine.state().tensors for engine in (one, two)]
    assert states[0].keys() == states[1].keys()
    for left, right in (weights, states):
        for name in left:
            assert torch.equal(left[name], right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_before", [0, 1, 4])
@pytest.mark.parametrize("num_frozen", [0, 1])
def test_training_goes_on_bit_for_bit_in_a_fresh_engine(tmp_path, dtype, num_before, num_frozen):
    config = CONFIG.model_copy(update={"num_frozen_layers": num_frozen})
    engine = TrainingEngine(tiny_model(dtype=dtype), config, trainable=True)
    for seed in range(num_before):
        update(engine, seed)
    write_state(tmp_path / "s", engine.state())
    resumed = TrainingEngine(tiny_model(dtype=dtype), config, trainable=True)
    resumed.load_state(read_state(tmp_path / "s"))
    assert resumed.version == num_before
    same(engine, resumed)
    for seed in range(4, 7):
        update(engine, seed)
        update(resumed, seed)
    same(engine, resumed)
    assert not torch.equal(engine.model.head.weight, tiny_model(dtype=dtype).head.weight)


def test_a_parameter_that_got_no_gradient_so_far_is_still_left_alone_after_resuming(tmp_path):
    """A gradient of zeros in its place would let weight decay shrink it."""
    left_out = "layers.0.mlp.up.weight"
    engine, resumed = (TrainingEngine(tiny_model(), CONFIG, trainable=True) for _ in range(2))
    update(engine, 0, leave_out=left_out)
    write_state(tmp_path / "s", engine.state())
    resumed.load_state(read_state(tmp_path / "s"))
    update(resumed, 1, leave_out=left_out)
    before = dict(tiny_model().named_parameters())[left_out]
    assert torch.equal(dict(resumed.model.named_parameters())[left_out], before)


def test_a_state_of_another_model_is_refused_by_name(tmp_path):
    engine = TrainingEngine(tiny_model(), CONFIG, trainable=True)
    wider = TrainingEngine(tiny_model(hidden_size=24), CONFIG, trainable=True)
    with pytest.raises(
        CheckpointError, match=r"master/embedding\.weight is \[13, 24\] in the checkpoint, but \[13, 16\]"
    ):
        engine.load_state(wider.state())
    with pytest.raises(CheckpointError, match=r"has no x, which the model has"):
        restore_tensor(torch.zeros(1), {}, "x")


def test_a_fingerprint_tells_names_types_shapes_and_bits_apart():
    one = torch.tensor([1.0, 2.0, 3.0, 4.0])
    variants = [
        {"a": one},
        {"b": one},
        {"a": one.bfloat16()},
        {"a": one.reshape(2, 2)},
        {"a": torch.tensor([1.0, 2.0, 3.0, 4.0000005])},
        {"a": one, "b": one},
        {},
    ]
    assert len({fingerprint(tensors) for tensors in variants}) == len(variants)
    assert fingerprint({"a": one, "b": one * 2}) == fingerprint({"b": one * 2, "a": one.clone()})
    assert fingerprint({"a": torch.tensor(1.0)}) == fingerprint({"a": torch.tensor(1.0)}), "no dimensions"
