"""The shard table: for every parameter its shape, how it may be cut and which pipeline stage owns it.

Plain data and arithmetic without torch. Tensor parallelism, HF load and save, the reallocation planner and
the memory model all read this one table; none of them is known here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from meshift.layout.shard import Group, Shard, Split
from meshift.models.config import DecoderConfig, HeadKind

LORA_A, LORA_B = "lora_a", "lora_b"
"""The parameters of an adapter, beside `weight` and `bias`."""


VALUE_HEAD = "head.value.weight"
"""The parameter of a language model's second head (`DecoderConfig.value_head`)."""


def is_adapters(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return name.rpartition(".")[2] in (LORA_A, LORA_B)


def shard_table(config: DecoderConfig, head: HeadKind) -> dict[str, Shard]:
    """Every parameter of a `Decoder`, by our name, in the order the module lists them."""
    vocabulary = Split(dim=0, unit=1, num_units=config.vocab_size, group="vocabulary")
    matrix = (config.vocab_size, config.hidden_size)
    tied = config.tie_word_embeddings and head == "lm"
    table = {"embedding.weight": Shard(shape=matrix, split=vocabulary, stage="embedding", tied=tied)}
    if config.positions == "learned":
        positions = (config.max_positions, config.hidden_size)
        table["embedding.position.weight"] = Shard(shape=positions, split=None, stage="embedding")
    for index in range(config.num_layers):
        for name, shape, split in _layer(config, index):
            table[f"layers.{index}.{name}"] = Shard(shape=shape, split=split, stage="layer", layer=index)
    for name, shape, split in _norm("norm", config, config.hidden_size):
        table[name] = Shard(shape=shape, split=split, stage="head")
    if head != "lm":
        table["head.weight"] = Shard(shape=(1, config.hidden_size), split=None, stage="head")
    elif not tied:
        table["head.weight"] = Shard(shape=matrix, split=vocabulary, stage="head")
    if config.value_head and head == "lm":
        table[VALUE_HEAD] = Shard(shape=(1, config.hidden_size), split=None, stage="head")
    return table


def num_parameters(table: Mapping[str, Shard]) -> int:
    """Numbers in the whole model; a tied embedding counts once."""
    return sum(shard.num_elements for shard in table.values())


def num_bytes(table: Mapping[str, Shard], bytes_per_element: int) -> int:
    """Bytes of the whole model's weights; a tied embedding counts once."""
    return num_parameters(table) * bytes_per_element


_Entry = tuple[str, tuple[int, ...], Split | None]


def _layer(config: DecoderConfig, index: int) -> Iterator[_Entry]:
    """Name within the layer, shape and cut of each of a layer's parameters, in the module's order."""
    rank_of = _no_adapter if config.adapter is None else partial(config.adapter.rank_at, index)
    before, after = config.norm_places != "after", config.norm_places != "before"
    if before:
        yield from _norm("attention_norm", config, config.hidden_size)
    yield from _attention(config, rank_of)
    if after:
        yield from _norm("attention_post_norm", config, config.hidden_size)
    if before:
        yield from _norm("mlp_norm", config, config.hidden_size)
    columns = Split(dim=0, unit=1, num_units=config.intermediate_size, group="mlp_columns")
    for name in ("mlp.gate", "mlp.up") if config.gated_mlp else ("mlp.up",):
        yield from _by_rows(name, config.hidden_size, columns, config.mlp_bias, rank_of(name))
    yield from _by_columns("mlp.down", config.hidden_size, columns, config.mlp_bias, rank_of("mlp.down"))
    if after:
        yield from _norm("mlp_post_norm", config, config.hidden_size)


def _no_adapter(name: str) -> int:
    return 0


def _attention(config: DecoderConfig, rank_of: Callable[[str], int]) -> Iterator[_Entry]:
    heads, kv_heads = _heads(config, config.num_heads, "heads"), _heads(config, config.num_kv_heads, "kv_heads")
    for own, split in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
        name = f"attention.{own}"
        yield from _by_rows(name, config.hidden_size, split, config.qkv_bias, rank_of(name))
    if config.query_key_norm == "head":
        # Whole everywhere, but each tensor rank sees its own heads only: the ranks' gradients must be added.
        yield from _norm("attention.query_norm", config, config.head_dim)
        yield from _norm("attention.key_norm", config, config.head_dim)
    elif config.query_key_norm == "projection":
        # Cut as the rows it scales; the mean of their squares is taken over all heads, hence over all ranks.
        yield from _norm("attention.query_norm", config, config.num_heads * config.head_dim, heads)
        yield from _norm("attention.key_norm", config, config.num_kv_heads * config.head_dim, kv_heads)
    name = "attention.output"
    yield from _by_columns(name, config.hidden_size, heads, config.output_bias, rank_of(name))


def _heads(config: DecoderConfig, count: int, group: Group) -> Split:
    queries_per_kv = config.num_heads // config.num_kv_heads
    return Split(dim=0, unit=config.head_dim, num_units=count, group=group, queries_per_kv=queries_per_kv)


def _norm(name: str, config: DecoderConfig, size: int, split: Split | None = None) -> Iterator[_Entry]:
    """A norm's weight, and its bias where the kind has one: whole, or cut by `split`."""
    yield f"{name}.weight", (size,), split
    if config.norm == "layer":
        yield f"{name}.bias", (size,), split


def _by_rows(name: str, hidden: int, split: Split, bias: bool, rank: int) -> Iterator[_Entry]:
    """A linear layer from hidden to the split's units: weight and bias are both cut along dim 0.

    Of its adapter B is cut as they are. A is whole: each tensor rank uses it for its own rows, so that gradients
    must be added.
    """
    rows = split.unit * split.num_units
    yield f"{name}.weight", (rows, hidden), split
    if bias:
        yield f"{name}.bias", (rows,), split
    if rank:
        yield f"{name}.{LORA_A}", (rank, hidden), None
        yield f"{name}.{LORA_B}", (rows, rank), split


def _by_columns(name: str, hidden: int, split: Split, bias: bool, rank: int) -> Iterator[_Entry]:
    """A linear layer from units to hidden: the weight is cut along dim 1; the bias, added once, is whole.

    Of its adapter A is cut as the weight is. B is whole: each tensor rank's part of the sum goes through it, so
    that gradients must be added.
    """
    columns = split.unit * split.num_units
    yield f"{name}.weight", (hidden, columns), replace(split, dim=1)
    if bias:
        yield f"{name}.bias", (hidden,), None
    if rank:
        yield f"{name}.{LORA_A}", (rank, columns), replace(split, dim=1)
        yield f"{name}.{LORA_B}", (hidden, rank), None
