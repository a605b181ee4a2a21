"""The decoder, written for one device: flat rows in, hidden rows out.

Knows nothing of batches, padding, caches or layouts. Which rows belong together is the attention's business,
how parameters are cut is `shards.py`'s, and where weights come from is `hf/`'s.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint as recompute

from meshift.kernels import functions
from meshift.kernels.cpu import LANES, Kernels, products_for
from meshift.models.attention import Attention
from meshift.models.config import Adapter, DecoderConfig, HeadKind
from meshift.models.embedding import Embedding
from meshift.models.heads import make_head
from meshift.models.linear import Linear, SummedLinear, fits_kernels
from meshift.models.masked_attention import AttentionLayer
from meshift.models.mlp import MLP
from meshift.models.norm import make_norm
from meshift.models.rotary import Angles, Rotary, rotate
from meshift.models.rows import pick


class SelfAttention(nn.Module):
    """Projections, norms and rotary around an `Attention`; grouped queries where num_kv_heads < num_heads."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.layer = AttentionLayer(
            index=index,
            scale=config.attention_scale,
            window=config.window(index),
            softcap=config.attention_softcap,
        )
        self.rotary = config.rotary_kind(index)
        self.head_dim = config.head_dim
        num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = Linear(config.hidden_size, num_queries, bias=config.qkv_bias)
        self.key = Linear(config.hidden_size, num_keys, bias=config.qkv_bias)
        self.value = Linear(config.hidden_size, num_keys, bias=config.qkv_bias)
        self.norm_by_head = config.query_key_norm == "head"
        self.query_norm: nn.Module | None = None
        self.key_norm: nn.Module | None = None
        if config.query_key_norm is not None:
            self.query_norm = make_norm(config, config.head_dim if self.norm_by_head else num_queries)
            self.key_norm = make_norm(config, config.head_dim if self.norm_by_head else num_keys)
        self.output = SummedLinear(num_queries, config.hidden_size, bias=config.output_bias)

    def forward(
        self, x: Tensor, angles: Sequence[Angles], attention: Attention, rows: Tensor | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], or only those `rows` (int64, none twice) of it."""
        query, key, value = self._query_key_value(x, None if self.rotary is None else angles[self.rotary])
        return self.output(pick(attention(self.layer, query, key, value).flatten(1), rows))

    def _query_key_value(self, x: Tensor, angles: Angles | None) -> Sequence[Tensor]:
        """Heads [T, heads, head_dim], queries and keys normed and turned."""
        kernels = self._kernels(x, angles)
        if kernels is not None:
            parts = (self.query, self.key, self.value)
            weights, biases = [part.weight for part in parts], [part.bias for part in parts]
            turn = functions.Turn(self.head_dim, angles)
            return functions.query_key_value(kernels, x, weights, biases, turn, [part.added(x) for part in parts])
        query = self.heads(self.query(x), self.query_norm)
        key = self.heads(self.key(x), self.key_norm)
        value = self.value(x).unflatten(-1, (-1, self.head_dim))
        return (query, key, value) if angles is None else (rotate(query, *angles), rotate(key, *angles), value)

    def _kernels(self, x: Tensor, angles: Angles | None) -> Kernels | None:
        """What does all of it at once, where nothing is normed between product and turn."""
        turns = angles is None or angles[0].shape[-1] % LANES == 0
        even = all(fits_kernels(part.weight) for part in (self.query, self.key, self.value))
        return products_for(x) if turns and even and self.query_norm is None else None

    def heads(self, rows: Tensor, norm: nn.Module | None) -> Tensor:
        """[T, heads * head_dim] -> [T, heads, head_dim], normed by head or before it is cut into heads."""
        heads = (-1, self.head_dim)
        if norm is None:
            return rows.unflatten(-1, heads)
        return norm(rows.unflatten(-1, heads)) if self.norm_by_head else norm(rows).unflatten(-1, heads)


class Layer(nn.Module):
    """x + attention(x), then x + mlp(x), each with a norm before, after (on what is added), or both."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        before, after = config.norm_places != "after", config.norm_places != "before"
        self.attention_norm = make_norm(config, config.hidden_size) if before else None
        self.attention = SelfAttention(config, index)
        self.attention_post_norm = make_norm(config, config.hidden_size) if after else None
        self.mlp_norm = make_norm(config, config.hidden_size) if before else None
        self.mlp = MLP(config)
        self.mlp_post_norm = make_norm(config, config.hidden_size) if after else None
        if config.adapter is not None:
            self.adapt(config.adapter)

    def adapt(self, adapter: Adapter) -> None:
        """Give the linear layers that it names an adapter, whose numbers are for others to fill."""
        for name in adapter.targets:
            rank = adapter.rank_at(self.attention.layer.index, name)
            linear = self.get_submodule(name)
            assert isinstance(linear, Linear)
            if rank:
                linear.adapt(rank, adapter.scale)

    def forward(
        self, x: Tensor, angles: Sequence[Angles], attention: Attention, rows: Tensor | None = None
    ) -> Tensor:
        """[T, hidden] -> [T, hidden], or only those `rows` (int64, none twice) of it."""
        added = self.attention(_norm(self.attention_norm, x), angles, attention, rows)
        x = pick(x, rows) + _norm(self.attention_post_norm, added)
        added = self.mlp(_norm(self.mlp_norm, x))
        return x + _norm(self.mlp_post_norm, added)


def _norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


class Layers(nn.ModuleList):
    """The layers that are here: all of them, until `keep` leaves some. Each keeps its name and its index."""

    def keep(self, indices: Collection[int]) -> None:
        """Forget all layers but those with these indices in the whole model."""
        kept = {name: layer for name, layer in self._modules.items() if int(name) in indices}
        self._modules.clear()
        self._modules.update(kept)


class Decoder(nn.Module):
    """A decoder and its head: `decoder(...)` gives hidden rows, `decoder.head(rows)` what is asked of them.

    Built under `torch.device("meta")` it costs nothing; `hf.load.load_model` fills it. Whoever cuts a model leaves
    out what is elsewhere: then `embeds` or `ends` is false, and rows enter or leave between layers.
    """

    def __init__(self, config: DecoderConfig, head: HeadKind = "lm") -> None:
        super().__init__()
        self.config = config
        self.head_kind: HeadKind = head
        self.embeds = self.ends = True
        self.embedding = Embedding(config)
        self.layers = Layers(Layer(config, index) for index in range(config.num_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.rotaries = nn.ModuleList(Rotary(config, kind) for kind in config.rotary_kinds)
        self.head = make_head(config, head, self.embedding)

    @property
    def first_layer(self) -> Layer:
        """The first of the layers that are here."""
        layer = next(iter(self.layers))
        assert isinstance(layer, Layer)
        return layer

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads of a layer that are here: all of them, unless the model was cut."""
        attention = self.first_layer.attention
        return attention.key.out_features // attention.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: Attention,
        *,
        entering: Tensor | None = None,
        rows: Tensor | None = None,
        checkpoint: bool = False,
    ) -> Tensor:
        """Hidden rows [T, hidden] after the final norm, in the weights' dtype.

        `tokens` and `positions` are int64 [T]. With `rows` (int64 [N], none twice) only those come out, as
        [N, hidden]: what nobody reads need not go through the last layer's products. With `checkpoint`, each layer
        runs again in the backward pass and keeps only its input: about a third more work for a fraction of the
        memory.

        Where the embedding is elsewhere, `entering` [T, hidden] is what the layers before these made of the
        tokens. Where the last layer is elsewhere, all rows come out as they leave the layers, and `rows` does
        nothing.
        """
        x = self.embedding(tokens, positions) if entering is None else entering
        angles = [rotary(positions, x.dtype) for rotary in self.rotaries]
        for number, layer in enumerate(self.layers, start=1):
            given = (x, angles, attention, rows if self.ends and number == len(self.layers) else None)
            if checkpoint and is_grad_enabled():
                # There is no dropout, hence no random state to restore.
                x = recompute(layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*given)
        return self.norm(x) if self.ends else x
