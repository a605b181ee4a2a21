"""The decoder, written for one device: flat rows in, hidden rows out.

Knows nothing of batches, padding, caches or layouts. Which rows belong together is the attention's business,
how parameters are cut is `shards.py`'s, and where weights come from is `hf/`'s.
"""

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint as recompute

from meshift.models.attention import Attention, AttentionLayer
from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.heads import make_head
from meshift.models.mlp import MLP
from meshift.models.norm import RMSNorm
from meshift.models.rotary import Rotary, rotate


class SelfAttention(nn.Module):
    """Projections and rotary around an `Attention`; grouped queries where num_kv_heads < num_heads."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.layer = AttentionLayer(index=index, scale=config.attention_scale)
        self.head_dim = config.head_dim
        num_queries, num_keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.query = nn.Linear(config.hidden_size, num_queries, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, num_keys, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, num_keys, bias=config.qkv_bias)
        self.output = nn.Linear(num_queries, config.hidden_size, bias=config.output_bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        heads = (-1, self.head_dim)
        query = rotate(self.query(x).unflatten(-1, heads), *angles)
        key = rotate(self.key(x).unflatten(-1, heads), *angles)
        value = self.value(x).unflatten(-1, heads)
        return self.output(attention(self.layer, query, key, value).flatten(1))


class Layer(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = SelfAttention(config, index)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        x = x + self.attention(self.attention_norm(x), angles, attention)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A decoder and its head: `decoder(...)` gives hidden rows, `decoder.head(rows)` what is asked of them.

    Built under `torch.device("meta")` it costs nothing; `hf.load.load_model` fills it.
    """

    def __init__(self, config: DecoderConfig, head: HeadKind = "lm") -> None:
        super().__init__()
        self.config = config
        self.head_kind: HeadKind = head
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.rotary = Rotary(config)
        self.head = make_head(config, head, self.embedding)

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, *, checkpoint: bool = False
    ) -> Tensor:
        """Hidden rows [T, hidden] after the final norm, in the weights' dtype.

        `tokens` and `positions` are int64 [T]. With `checkpoint`, each layer runs again in the backward pass and
        keeps only its input: about a third more work for a fraction of the memory.
        """
        x = self.embedding(tokens)
        angles = self.rotary(positions, x.dtype)
        for layer in self.layers:
            if checkpoint and is_grad_enabled():
                # There is no dropout, hence no random state to restore.
                x = recompute(layer, x, angles, attention, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, angles, attention)
        return self.norm(x)
