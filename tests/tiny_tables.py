"""Shard tables of small models: one of each family, and random ones whose sizes divide nothing."""

from types import MappingProxyType

from hypothesis import strategies as st

from meshift.layout.layout import Layout, Placement
from meshift.layout.mesh import Device, Mesh
from meshift.models.config import DecoderConfig
from meshift.models.hf.families import FAMILIES, read_config
from meshift.models.shards import shard_table

SIZES = MappingProxyType(
    {
        "vocab_size": 61,
        "hidden_size": 30,
        "intermediate_size": 47,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "max_position_embeddings": 9,
        "layer_types": None,
    }
)


def family_table(name, head="lm", **changes):
    """The table of a small model of a family of `FAMILIES`; it needs no torch."""
    raw = {"model_type": name, "architectures": [FAMILIES[name].causal], **SIZES, **changes}
    return shard_table(read_config(raw, "a test"), head)


@st.composite
def random_tables(draw):
    """Tables of decoders of any shape: heads shared or not, tied or not, norms and biases of every kind."""
    num_kv_heads = draw(st.integers(1, 4))
    flag = st.booleans()
    config = DecoderConfig(
        family="llama",
        vocab_size=draw(st.integers(4, 23)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(4, 13)),
        num_layers=draw(st.integers(1, 5)),
        num_heads=num_kv_heads * draw(st.integers(1, 4)),
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.integers(1, 3)),
        norm_eps=1e-5,
        tie_word_embeddings=draw(flag),
        qkv_bias=draw(flag),
        output_bias=draw(flag),
        mlp_bias=draw(flag),
        activation="silu",
        max_positions=draw(st.integers(1, 7)),
        hf={},
        norm=draw(st.sampled_from(["rms", "layer"])),
        query_key_norm=draw(st.sampled_from([None, "head", "projection"])),
        positions=draw(st.sampled_from(["rotary", "learned"])),
        gated_mlp=draw(flag),
    )
    return shard_table(config, draw(st.sampled_from(["lm", "value"])))


def num_heads(shards):
    """Query heads of the model, which is the most tensor ranks it can have."""
    return next(s.split.num_units for s in shards.values() if s.split is not None and s.split.group == "heads")


@st.composite
def layouts(draw, shards, most_ranks=12):
    """Layouts that can cut the model, data-sharded or not."""
    num_layers = 1 + max(s.layer for s in shards.values() if s.layer is not None)
    tensor = draw(st.integers(1, min(4, num_heads(shards))))
    pipeline = draw(st.integers(1, min(3, num_layers, most_ranks // tensor)))
    data = draw(st.integers(1, min(4, most_ranks // tensor // pipeline)))
    return Layout(data=data, tensor=tensor, pipeline=pipeline, sharded=draw(st.booleans()))


@st.composite
def placement_pairs(draw, shards):
    """Two placements, on meshes that are equal, disjoint or share some devices, on one to three hosts."""
    pair = draw(layouts(shards)), draw(layouts(shards))
    num_hosts = draw(st.integers(1, 3))
    pool = [Device(host=f"n{i % num_hosts}", index=i // num_hosts) for i in range(sum(p.num_ranks for p in pair))]
    orders = draw(st.permutations(pool)), draw(st.permutations(pool))
    if draw(st.booleans()):
        orders = pool, pool  # the usual case: the same devices, in order
    return tuple(
        Placement(mesh=Mesh(devices=tuple(order[: layout.num_ranks])), layout=layout)
        for layout, order in zip(pair, orders, strict=True)
    )
