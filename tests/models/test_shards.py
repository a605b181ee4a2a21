"""The shard table against the module's real parameters, and cuts that really partition."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from family_variants import EACH_FAMILY, VARIANTS
from hypothesis import given
from hypothesis import strategies as st

from meshift.errors import LayoutError
from meshift.models.attention import PlainAttention
from meshift.models.decoder import Decoder, Layer
from meshift.models.hf.load import load_config, load_model
from meshift.models.shards import Split, num_bytes, num_parameters, shard_table


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("head", ["lm", "value", "reward"])
def test_the_table_lists_exactly_the_modules_parameters(saved, name, head):
    config = load_config(saved(name).folder)
    with torch.device("meta"):
        model = Decoder(config, head)
    table = shard_table(config, head)
    assert [(n, s.shape) for n, s in table.items()] == [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    assert num_parameters(table) == sum(p.numel() for p in model.parameters())
    assert num_bytes(table, 2) == 2 * num_parameters(table)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_cut_covers_its_dim_in_units(saved, name):
    for shard in shard_table(load_config(saved(name).folder), "lm").values():
        if shard.split is not None:
            assert shard.split.unit * shard.split.num_units == shard.shape[shard.split.dim]


@given(unit=st.integers(1, 64), num_units=st.integers(1, 50), num_parts=st.integers(1, 50))
def test_parts_follow_one_another_and_cover_the_dim_or_are_refused(unit, num_units, num_parts):
    for group in ("heads", "mlp_columns"):
        split = Split(dim=0, unit=unit, num_units=num_units, group=group)
        if num_parts > num_units:
            with pytest.raises(LayoutError, match="cannot be cut into"):
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


@pytest.mark.parametrize("num_parts", [2, 3, 4])
@pytest.mark.parametrize("name", [name for name in EACH_FAMILY if not name.startswith("olmo2")])
def test_the_parts_of_one_layer_add_up_to_the_whole_layer(saved, name, num_parts):
    """Tensor parallelism as arithmetic: each part's attention and MLP output, summed, is the whole's.

    Three parts of four heads are uneven; two key-value heads are fewer than three or four parts. OLMo 2
    norms over all heads at once, which no part can do alone.
    """
    model = load_model(saved(name).folder)
    table, config = shard_table(model.config, "lm"), model.config
    x = torch.randn(9, config.hidden_size, generator=torch.Generator().manual_seed(0))
    angles = [rotary(torch.arange(9), x.dtype) for rotary in model.rotaries]
    for module, inputs in (("attention", (x, angles, PlainAttention([9]))), ("mlp", (x,))):
        whole = model.layers[0].get_submodule(module)
        parts = []
        for part in range(num_parts):
            piece = Layer(_smaller(config, table, part, num_parts), 0).get_submodule(module)
            cuts = {n: (p, table[f"layers.0.{module}.{n}"].split) for n, p in whole.named_parameters()}
            piece.load_state_dict({n: _cut(p, split, part, num_parts) for n, (p, split) in cuts.items()})
            parts.append(piece(*inputs))
        once = {"attention": "output.bias", "mlp": "down.bias"}[module]
        bias = dict(whole.named_parameters()).get(once, torch.zeros(()))
        torch.testing.assert_close(sum(parts) - (num_parts - 1) * bias, whole(*inputs), atol=1e-5, rtol=1e-5)


def _smaller(config, table, part, num_parts):
    """The layer that a part is: a decoder's, with fewer heads and columns."""
    names = {"num_heads": "attention.query", "num_kv_heads": "attention.key", "intermediate_size": "mlp.up"}
    splits = {key: table[f"layers.0.{name}.weight"].split for key, name in names.items()}
    units = {key: split.units(part, num_parts) for key, split in splits.items()}
    return replace(config, **{key: stop - start for key, (start, stop) in units.items()})


def _cut(parameter, split, part, num_parts):
    if split is None:
        return parameter
    start, stop = split.bounds(part, num_parts)
    return parameter.narrow(split.dim, start, stop - start)


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
