"""What the kernels are held to: the same in plain torch and fp32, and how close is close enough."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDED = 2.0**-8
"""How far a number may be off that was rounded to bfloat16 once: half a step is 2**-9, and fp32 sums differ."""
ACTIVATIONS = {
    "none": lambda x: x,
    "silu": F.silu,
    "swish": F.silu,
    "relu": torch.relu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def random_numbers(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal, drawn anew for each shape and seed."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def rounded_once(found: Tensor, expected: Tensor) -> None:
    """`found` is `expected`, a number in fp32, rounded to bfloat16."""
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), rtol=ROUNDED, atol=1e-5 * _size(expected))


def near(found: Tensor, expected: Tensor, within: float = 2.0**-6) -> None:
    """No number is off by more than that part of the largest one, or by 1e-5 where all ought to be zero."""
    assert found.shape == expected.shape
    error = (found.detach().float() - expected.detach().float()).abs()
    assert not error.numel() or float(error.max()) <= within * _size(expected) + 1e-5, float(error.max())


def _size(expected: Tensor) -> float:
    return float(expected.detach().abs().max()) if expected.numel() else 0.0


def causal_attention(heads: Sequence[Tensor], lengths: Sequence[int], *, scale: float, window: int = 0) -> Tensor:
    """Of packed query, key and value [T, heads, dim], sequence by sequence. Differentiable."""
    found = []
    for query, key, value in zip(*(part.split(list(lengths)) for part in heads), strict=True):
        places = torch.arange(len(query))
        seen = places <= places[:, None]
        if window:
            seen &= places > places[:, None] - window
        parts = [part.transpose(0, 1)[None] for part in (query, key, value)]
        grouped = query.shape[1] != key.shape[1]
        attended = F.scaled_dot_product_attention(*parts, attn_mask=seen, scale=scale, enable_gqa=grouped)
        found.append(attended[0].transpose(0, 1))
    return torch.cat(found)
