"""Tiny random decoders for the tests of generation."""

from typing import Any

import pytest
import torch

from meshift.models.config import DecoderConfig
from meshift.models.decoder import Decoder


def tiny_decoder(
    family: str = "llama",
    *,
    tied: bool = True,
    num_kv_heads: int = 2,
    vocab_size: int = 61,
    seed: int = 0,
    **features: Any,
):
    """A two-layer fp32 decoder whose weights are large enough for clearly uneven distributions."""
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48}
    config = DecoderConfig(
        family=family,
        **sizes,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        norm_eps=1e-5,
        tie_word_embeddings=tied,
        qkv_bias=family == "qwen2",
        output_bias=False,
        mlp_bias=False,
        activation="silu",
        max_positions=128,
        hf={
            "model_type": family,
            **sizes,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": num_kv_heads,
            "max_position_embeddings": 128,
        },
        **features,
    )
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or family == "qwen2":
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.3 + (parameter.dim() == 1))
    return model


@pytest.fixture(scope="session")
def model() -> Decoder:
    return tiny_decoder()


@pytest.fixture(scope="session")
def make_model():
    return tiny_decoder
