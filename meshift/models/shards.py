"""The shard table: for every parameter its shape, how it may be cut and which pipeline stage owns it.

Plain data and arithmetic without torch. Tensor parallelism, HF load and save, the reallocation planner and
the memory model all read this one table; none of them is known here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from meshift.models.config import DecoderConfig, HeadKind

Group = Literal["heads", "kv_heads", "mlp_columns", "vocabulary"]
Stage = Literal["embedding", "layer", "head"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """A parameter is cut along `dim`, only between units of `unit` rows; `num_units` units make the whole.

    Parameters of one `group` are cut at the same units, since their results meet unit by unit: a query
    head with the key-value head it reads, a gate column with its up and down columns.

    Example: a query projection of 9 heads of 64 rows is `Split(dim=0, unit=64, num_units=9, group="heads")`.
    """

    dim: int
    unit: int
    num_units: int
    group: Group

    def bounds(self, part: int, num_parts: int) -> tuple[int, int]:
        """Rows [start, stop) of one of `num_parts` parts; the parts follow one another and cover the dim.

        Heads must divide evenly, or query heads would part from their key-value heads; MLP columns and
        vocabulary rows need not, and earlier parts then hold one unit more. Raises `ValueError`.
        """
        if not 0 <= part < num_parts:
            raise ValueError(f"There is no part {part} of {num_parts}.")
        each, left = divmod(self.num_units, num_parts)
        if each == 0 or (left and self.group in ("heads", "kv_heads")):
            raise ValueError(f"{self.num_units} {self.group} cannot be cut into {num_parts} parts.")
        start = part * each + min(part, left)
        return start * self.unit, (start + each + (part < left)) * self.unit


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One parameter: its full shape, its cut (None: each tensor rank holds all of it), its pipeline stage.

    `layer` is the index for stage `layer`, else None. `tied` marks an embedding that the head reads too.
    """

    shape: tuple[int, ...]
    split: Split | None
    stage: Stage
    layer: int | None = None
    tied: bool = False

    @property
    def num_elements(self) -> int:
        """Numbers in the whole parameter."""
        return prod(self.shape)


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
        for name, shape, split in _layer(config):
            table[f"layers.{index}.{name}"] = Shard(shape=shape, split=split, stage="layer", layer=index)
    for name, shape, split in _norm("norm", config, config.hidden_size):
        table[name] = Shard(shape=shape, split=split, stage="head")
    if head != "lm":
        table["head.weight"] = Shard(shape=(1, config.hidden_size), split=None, stage="head")
    elif not tied:
        table["head.weight"] = Shard(shape=matrix, split=vocabulary, stage="head")
    return table


def num_parameters(table: Mapping[str, Shard]) -> int:
    """Numbers in the whole model; a tied embedding counts once."""
    return sum(shard.num_elements for shard in table.values())


def num_bytes(table: Mapping[str, Shard], bytes_per_element: int) -> int:
    """Bytes of the whole model's weights; a tied embedding counts once."""
    return num_parameters(table) * bytes_per_element


_Entry = tuple[str, tuple[int, ...], Split | None]
_Units = tuple[int, int, Group]  # rows in a unit, number of units, group


def _layer(config: DecoderConfig) -> Iterator[_Entry]:
    """Name within the layer, shape and cut of each of a layer's parameters, in the module's order."""
    before, after = config.norm_places != "after", config.norm_places != "before"
    if before:
        yield from _norm("attention_norm", config, config.hidden_size)
    yield from _attention(config)
    if after:
        yield from _norm("attention_post_norm", config, config.hidden_size)
    if before:
        yield from _norm("mlp_norm", config, config.hidden_size)
    columns: _Units = (1, config.intermediate_size, "mlp_columns")
    for name in ("mlp.gate", "mlp.up") if config.gated_mlp else ("mlp.up",):
        yield from _by_rows(name, config.hidden_size, columns, config.mlp_bias)
    yield from _by_columns("mlp.down", config.hidden_size, columns, config.mlp_bias)
    if after:
        yield from _norm("mlp_post_norm", config, config.hidden_size)


def _attention(config: DecoderConfig) -> Iterator[_Entry]:
    heads: _Units = (config.head_dim, config.num_heads, "heads")
    kv_heads: _Units = (config.head_dim, config.num_kv_heads, "kv_heads")
    for name, units in (("query", heads), ("key", kv_heads), ("value", kv_heads)):
        yield from _by_rows(f"attention.{name}", config.hidden_size, units, config.qkv_bias)
    if config.query_key_norm == "head":
        # Whole everywhere, but each tensor rank sees its own heads only: the ranks' gradients must be added.
        yield from _norm("attention.query_norm", config, config.head_dim)
        yield from _norm("attention.key_norm", config, config.head_dim)
    elif config.query_key_norm == "projection":
        # Cut as the rows it scales; the mean of their squares is taken over all heads, hence over all ranks.
        yield from _norm("attention.query_norm", config, config.num_heads * config.head_dim, heads)
        yield from _norm("attention.key_norm", config, config.num_kv_heads * config.head_dim, kv_heads)
    yield from _by_columns("attention.output", config.hidden_size, heads, config.output_bias)


def _norm(name: str, config: DecoderConfig, size: int, units: _Units | None = None) -> Iterator[_Entry]:
    """A norm's weight, and its bias where the kind has one: whole, or cut between `units`."""
    split = None if units is None else Split(dim=0, unit=units[0], num_units=units[1], group=units[2])
    yield f"{name}.weight", (size,), split
    if config.norm == "layer":
        yield f"{name}.bias", (size,), split


def _by_rows(name: str, hidden: int, units: _Units, bias: bool) -> Iterator[_Entry]:
    """A linear layer from hidden to units: weight and bias are both cut along dim 0."""
    unit, count, group = units
    split = Split(dim=0, unit=unit, num_units=count, group=group)
    yield f"{name}.weight", (unit * count, hidden), split
    if bias:
        yield f"{name}.bias", (unit * count,), split


def _by_columns(name: str, hidden: int, units: _Units, bias: bool) -> Iterator[_Entry]:
    """A linear layer from units to hidden: the weight is cut along dim 1; the bias, added once, is whole."""
    unit, count, group = units
    yield f"{name}.weight", (hidden, unit * count), Split(dim=1, unit=unit, num_units=count, group=group)
    if bias:
        yield f"{name}.bias", (hidden,), None
