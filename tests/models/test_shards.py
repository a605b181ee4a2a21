"""The shard table against the module's real parameters, and cuts that really partition."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshift.models.decoder import Decoder
from meshift.models.hf.load import load_config
from meshift.models.shards import Split, num_bytes, num_parameters, shard_table

NAMES = ["llama", "llama-mha", "llama-tied", "llama-biases", "llama-wide-heads", "qwen2", "qwen2-tied"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head", ["lm", "value", "reward"])
def test_the_table_lists_exactly_the_modules_parameters(saved, name, head):
    config = load_config(saved(name).folder)
    with torch.device("meta"):
        model = Decoder(config, head)
    table = shard_table(config, head)
    assert [(n, s.shape) for n, s in table.items()] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert num_parameters(table) == sum(p.numel() for p in model.parameters())
    assert num_bytes(table, 2) == 2 * num_parameters(table)


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_covers_its_dim_in_units(saved, name):
    for shard in shard_table(load_config(saved(name).folder), "lm").values():
        if shard.split is not None:
            assert shard.split.unit * shard.split.num_units == shard.shape[shard.split.dim]


@given(unit=st.integers(1, 64), num_units=st.integers(1, 50), num_parts=st.integers(1, 50))
def test_parts_follow_one_another_and_cover_the_dim_or_are_refused(unit, num_units, num_parts):
    for group in ("heads", "mlp_columns"):
        split = Split(dim=0, unit=unit, num_units=num_units, group=group)
        if num_parts > num_units or (group == "heads" and num_units % num_parts):
            with pytest.raises(ValueError, match="cannot be cut into"):
                split.bounds(0, num_parts)
            continue
        bounds = [split.bounds(part, num_parts) for part in range(num_parts)]
        rows = [row for start, stop in bounds for row in range(start, stop)]
        assert rows == list(range(unit * num_units))
        sizes = [stop - start for start, stop in bounds]
        assert max(sizes) - min(sizes) <= unit
        assert all(size % unit == 0 for size in sizes)


@pytest.mark.parametrize("part", [-1, 2])
def test_a_part_that_does_not_exist_is_refused(part):
    with pytest.raises(ValueError, match="no part"):
        Split(dim=0, unit=1, num_units=4, group="vocabulary").bounds(part, 2)


def test_the_parts_of_one_layer_add_up_to_the_whole_layer(saved):
    """Tensor parallelism as arithmetic: each part's attention and MLP output, summed, is the whole's."""
    model = Decoder(load_config(saved("llama-biases").folder)).double()
    table = shard_table(model.config, "lm")
    x = torch.randn(3, model.config.hidden_size, dtype=torch.float64)
    mlp = model.layers[0].mlp
    parts = []
    for part in range(2):
        cut = {}
        for name in ("gate.weight", "gate.bias", "up.weight", "up.bias", "down.weight"):
            split = table[f"layers.0.mlp.{name}"].split
            start, stop = split.bounds(part, 2)
            cut[name] = mlp.get_parameter(name).narrow(split.dim, start, stop - start)
        gate = torch.nn.functional.silu(x @ cut["gate.weight"].T + cut["gate.bias"])
        parts.append((gate * (x @ cut["up.weight"].T + cut["up.bias"])) @ cut["down.weight"].T)
    assert table["layers.0.mlp.down.bias"].split is None
    torch.testing.assert_close(sum(parts) + mlp.down.bias, mlp(x))


def test_stages_name_the_owner_of_every_parameter(saved):
    table = shard_table(load_config(saved("llama-tied").folder), "lm")
    assert table["embedding.weight"].stage == "embedding"
    assert table["embedding.weight"].tied
    assert table["norm.weight"].stage == "head"
    for name, shard in table.items():
        if name.startswith("layers."):
            assert (shard.stage, shard.layer) == ("layer", int(name.split(".")[1]))


def test_a_tied_model_with_a_scalar_head_has_nothing_to_tie(saved):
    assert not shard_table(load_config(saved("llama-tied").folder), "reward")["embedding.weight"].tied


def test_the_table_is_read_without_torch():
    code = "import sys, meshift.models.shards, meshift.models.hf.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
