"""What the hardware allows: seconds that a work would take at the measured rates. Pure arithmetic, no torch.

N body parameters (all matrices of the layers), V x H the head, L layers, A = heads x head_dim, T tokens, `len` a
sequence's length. A forward pass costs 2 N T + 2 V H (rows through the head) + 2 L A sum(len^2) FLOPs; the last
term is causal attention (two products of len^2 / 2 x A, 2 FLOPs each). Rows that nobody reads need not go through
what follows the last layer's attention, and a beginning that sequences share need run only once. Training costs
three times that. A decode step reads all weights and the live keys and values once; it takes the larger of that
over the bandwidth and its FLOPs over the GEMM rate. Norms, rotary, softmax, sampling and optimizer are not
counted: they are overhead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FULL_ROWS = 64
"""Fewer rows than this are slow for reasons of the kernels and of the bandwidth, not of the arithmetic units: the
GEMM rate of a smaller batch is taken to be that of so many rows, and bandwidth is counted by itself."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama-shaped decoder with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    @staticmethod
    def of(config: Mapping[str, int]) -> Shape:
        """From a Hugging Face config.json."""
        num_heads = config["num_attention_heads"]
        return Shape(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=config.get("num_key_value_heads", num_heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
            vocab_size=config["vocab_size"],
        )

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's products, queries, keys and values as one, and gate and up as one."""
        attention = self.num_heads * self.head_dim
        return [
            (self.hidden_size, attention + 2 * self.num_kv_heads * self.head_dim),
            (attention, self.hidden_size),
            (self.hidden_size, 2 * self.intermediate_size),
            (self.intermediate_size, self.hidden_size),
        ]

    @property
    def num_body(self) -> int:
        """Parameters of all layers' matrices."""
        return self.num_layers * sum(a * b for a, b in self.matrices)

    @property
    def num_last(self) -> int:
        """Parameters of what follows the last layer's attention."""
        return sum(a * b for a, b in self.matrices[1:])

    @property
    def num_head(self) -> int:
        """Parameters of the head."""
        return self.vocab_size * self.hidden_size

    @property
    def num_kv(self) -> int:
        """Numbers that one token leaves in the key-value cache."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Measured rates of one compute type: FLOP/s of the model's products by row count, forward and all three of
    training; bytes/s of a streaming read; bytes of a number."""

    gemm: Mapping[int, float]
    train_gemm: float
    bandwidth: float
    num_bytes: int

    def gemm_rate(self, num_rows: int) -> float:
        """The best rate measured at any row count up to this one, or up to `FULL_ROWS`."""
        known = [rate for rows, rate in self.gemm.items() if rows <= max(num_rows, FULL_ROWS)]
        return max(known or self.gemm.values())


def attention_flops(shape: Shape, lengths: Sequence[int]) -> float:
    """Causal attention, forward."""
    return 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * sum(n * n for n in lengths)


Shared = Sequence[tuple[int, int]]
"""Beginnings in common: how many tokens, and how many times they need not run again."""


def forward_flops(shape: Shape, lengths: Sequence[int], num_read: int, shared: Shared = ()) -> float:
    """A forward pass over whole sequences with `num_read` rows through the head."""
    num_rows = sum(lengths) - sum(length * times for length, times in shared)
    attention = attention_flops(shape, lengths)
    attention -= sum(times * attention_flops(shape, [length]) for length, times in shared)
    products = shape.num_body * num_rows - shape.num_last * (num_rows - num_read) + shape.num_head * num_read
    return 2.0 * products + attention


def forward_seconds(
    shape: Shape, limits: Limits, lengths: Sequence[int], num_read: int, shared: Shared = ()
) -> float:
    """The forward pass at the GEMM rate of so many rows."""
    return forward_flops(shape, lengths, num_read, shared) / limits.gemm_rate(sum(lengths))


def training_seconds(
    shape: Shape, limits: Limits, lengths: Sequence[int], num_read: int, shared: Shared = ()
) -> float:
    """Forward and backward: three times the forward's FLOPs, at the GEMM rate of training."""
    return 3.0 * forward_flops(shape, lengths, num_read, shared) / limits.train_gemm


def decode_seconds(shape: Shape, limits: Limits, cached: Sequence[int]) -> float:
    """One decode step of sequences with so many tokens in the cache: the slower of bandwidth and arithmetic."""
    num_rows = len(cached)
    numbers = shape.num_body + shape.num_head + shape.num_kv * sum(cached)
    flops = 2.0 * (shape.num_body + shape.num_head) * num_rows
    flops += 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * sum(cached)
    return max(numbers * limits.num_bytes / limits.bandwidth, flops / limits.gemm_rate(num_rows))


def generation_seconds(shape: Shape, limits: Limits, prompts: Sequence[int], new: Sequence[int]) -> float:
    """Prompts in one pass, which gives each its first token, then a decode step for every further token of those
    that still live."""
    seconds = forward_seconds(shape, limits, prompts, len(prompts))
    for step in range(1, max(new)):
        live = [p + step for p, n in zip(prompts, new, strict=True) if n > step]
        seconds += decode_seconds(shape, limits, live)
    return seconds
