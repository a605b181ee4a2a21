"""What is measured: a few layers of a model, or of a tensor rank's part of it, with random weights; and a clock.

It knows nothing of what is done with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from statistics import median

import torch

from meshift.models.config import DecoderConfig
from meshift.models.decoder import Decoder
from meshift.models.hf.families import read_config

STAND_IN = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32768,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""Measured where no model is named."""
SPREAD = 0.02


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured: rows of passes and of decode steps, parts of a layer, layers, adapters, seconds."""

    rows: tuple[int, ...] = (8, 32, 128, 512)
    live: tuple[int, ...] = (1, 4, 16, 64)
    cuts: tuple[int, ...] = (1, 2, 4)
    layers: int = 12
    ranks: tuple[int, ...] = (16, 64)
    seconds: float = 0.25
    repeats: int = 3

    @property
    def num_products(self) -> int:
        """How many `products.products` gives: of passes, the head, adapters, prompts, decoding and drawing."""
        return len(self.rows) * (2 + 3 + 1 + 2 * len(self.ranks) + 1) + 2 * len(self.live)


THOROUGH = Effort()
QUICK = Effort(rows=(32, 512), live=(1, 16), cuts=(1,), layers=3, seconds=0.1, repeats=2)


def stand_in() -> DecoderConfig:
    """A Llama of usual proportions."""
    return read_config(dict(STAND_IN), "a stand-in")


def narrowed(config: DecoderConfig, cut: int, layers: int) -> DecoderConfig:
    """So few layers, each as the first of `cut` tensor ranks has it, with its part of the vocabulary."""
    kv_heads = max(1, ceil(config.num_kv_heads / cut))
    heads = config.num_heads // config.num_kv_heads * kv_heads
    return replace(
        config,
        num_layers=min(layers, config.num_layers),
        num_kv_heads=kv_heads,
        num_heads=heads if cut <= config.num_kv_heads else max(1, ceil(config.num_heads / cut)),
        intermediate_size=ceil(config.intermediate_size / cut),
        vocab_size=ceil(config.vocab_size / cut),
        windows=config.windows[:layers],
        rotary_types=config.rotary_types[:layers],
    )


def made(config: DecoderConfig, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model with small random weights."""
    model = Decoder(config).to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(SPREAD * torch.randn(parameter.shape, generator=generator))
    return model


def numbers_of_layer(model: Decoder) -> int:
    """Of its first layer."""
    return sum(parameter.numel() for parameter in model.first_layer.parameters())


def timed(call: Callable[[], object], device: torch.device, effort: Effort) -> float:
    """The median of some calls, after one that does not count; of a long one, once is enough."""
    _wait(device, call)
    taken: list[float] = []
    deadline = time.perf_counter() + effort.seconds
    while time.perf_counter() < deadline or (len(taken) < effort.repeats and taken[0] < effort.seconds):
        started = time.perf_counter()
        _wait(device, call)
        taken.append(time.perf_counter() - started)
    return median(taken)


def _wait(device: torch.device, call: Callable[[], object]) -> None:
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
