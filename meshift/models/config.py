"""What a decoder looks like, as plain numbers, plus the Hugging Face config it came from.

Knows nothing of tensors, files or architectures' names; `hf/families.py` translates configs into this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

HeadKind = Literal["lm", "value", "reward"]
NormKind = Literal["rms", "rms_plus_one", "layer"]
NormPlaces = Literal["before", "after", "both"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Low-rank matrices beside linear layers, so that `x W'` becomes `x W' + scale (x A') B'`.

    A is [rank, in], B [out, rank]. `targets` are our names of the linear layers within a layer, from layer
    `first_layer` on. `made_for` is the model that it belongs to, as others may load it: a folder or a hub id;
    `save_merged` asks for a whole model when it is saved. (Hu et al. 2021, arXiv:2106.09685; `rank_stabilized`:
    Kalajdzievski 2023, arXiv:2312.03732.)

    Example: `Adapter(rank=16, alpha=32.0, targets=("attention.query", "attention.value"))`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    first_layer: int = 0
    rank_stabilized: bool = False
    made_for: str = ""
    save_merged: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha over its root."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def rank_at(self, layer: int, name: str) -> int:
        """The rank beside a layer's linear layer of this name; 0 where there is no adapter."""
        return self.rank if layer >= self.first_layer and name in self.targets else 0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The numbers of one decoder.

    `qkv_bias`, `output_bias` and `mlp_bias` say which linear layers carry a bias: query, key and value; the
    attention's output; the MLP's. `hf` is the raw `config.json` and `generation` the raw
    `generation_config.json` (None if there was none): both are written out again when the model is saved.
    Dropout is never applied, whatever `hf` says: RL compares logprobs between passes, and it would blur them.

    The rest is what only some families have; the defaults are llama's:

    * `norm`: root mean square, the same with the weight counted from one, or layer norm with a bias;
      `norm_places`: before the attention and the MLP, after them (on what they add), or both.
    * `query_key_norm`: queries and keys are normed head by head, or over the whole projection.
    * `query_scale` replaces the default `attention_scale`; `attention_softcap` and `logit_softcap` c turn a
      score s into c tanh(s / c).
    * `windows`: for each layer the number of positions a token sees, itself included (None: all before it);
      an empty tuple means None throughout.
    * `positions`: rotary, or a learned vector for each. `rotary_types` names, for each layer, the entry of
      `rope_parameters` it turns by, where layers differ; empty: they do not. `partial_rotary`: only the part of
      each head that `partial_rotary_factor` names is turned.
    * `embedding_scale` multiplies embeddings; `gated_mlp` is false for a plain MLP.

    `adapter` is none of the model's own: adapters that are trained beside it. Nor is `value_head`: a head for
    values beside the language model's.

    Example: `DecoderConfig(family="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64, norm_eps=1e-5, tie_word_embeddings=True,
    qkv_bias=False, output_bias=False, mlp_bias=False, activation="silu", max_positions=8192, hf={...})`.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str
    max_positions: int
    hf: Mapping[str, Any]
    generation: Mapping[str, Any] | None = None
    norm: NormKind = "rms"
    norm_places: NormPlaces = "before"
    query_key_norm: Literal["head", "projection"] | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    windows: tuple[int | None, ...] = ()
    positions: Literal["rotary", "learned"] = "rotary"
    rotary_types: tuple[str, ...] = ()
    partial_rotary: bool = False
    embedding_scale: float | None = None
    gated_mlp: bool = True
    adapter: Adapter | None = None
    value_head: bool = False

    @property
    def linear_names(self) -> tuple[str, ...]:
        """Our names of the linear layers within a layer, in order."""
        attention = tuple(f"attention.{name}" for name in ("query", "key", "value", "output"))
        return (*attention, *(("mlp.gate",) if self.gated_mlp else ()), "mlp.up", "mlp.down")

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by: 1 / sqrt(head_dim) unless `query_scale` is given."""
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def rotary_kinds(self) -> tuple[str | None, ...]:
        """The different sets of rotary angles that layers use: none, one (None), or the names of several."""
        if self.positions != "rotary":
            return ()
        return tuple(sorted(set(self.rotary_types))) or (None,)

    def window(self, layer: int) -> int | None:
        """How many positions a token of this layer sees, itself included; None: all before it."""
        return self.windows[layer] if self.windows else None

    def rotary_kind(self, layer: int) -> int | None:
        """The place in `rotary_kinds` of the angles that this layer turns by; None: it does not."""
        if self.positions != "rotary":
            return None
        return self.rotary_kinds.index(self.rotary_types[layer]) if self.rotary_types else 0

    def owns_output_matrix(self, head: HeadKind) -> bool:
        """Whether this head has a weight of its own (a tied language-model head reads the embedding's)."""
        return head != "lm" or not self.tie_word_embeddings
