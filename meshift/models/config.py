"""What a decoder looks like, as plain numbers, plus the Hugging Face config it came from.

Knows nothing of tensors, files or architectures' names; `hf/families.py` translates configs into this.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

HeadKind = Literal["lm", "value", "reward"]


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The numbers of one decoder.

    `qkv_bias`, `output_bias` and `mlp_bias` say which linear layers carry a bias: query, key and value; the
    attention's output; the MLP's three. `hf` is the raw `config.json` and `generation` the raw
    `generation_config.json` (None if there was none): both are written out again when the model is saved.
    Dropout is never applied, whatever `hf` says: RL compares logprobs between passes, and it would blur them.

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

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by: 1 / sqrt(head_dim)."""
        return self.head_dim**-0.5

    def owns_output_matrix(self, head: HeadKind) -> bool:
        """Whether this head has a weight of its own (a tied language-model head reads the embedding's)."""
        return head != "lm" or not self.tie_word_embeddings
