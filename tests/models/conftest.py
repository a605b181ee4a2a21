"""Tiny random `transformers` models, saved once per session and shared by the tests that only read them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import transformers
from transformers.utils import logging

SIZES = MappingProxyType(
    {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
)
FACTORS = [1.0 + i / 4 for i in range(4)]
ROPES = MappingProxyType(
    {
        "linear": {"rope_type": "linear", "factor": 2.0},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        "longrope": {
            "rope_type": "longrope",
            "factor": 4.0,
            "short_factor": FACTORS,
            "long_factor": [2 * f for f in FACTORS],
            "original_max_position_embeddings": 32,
        },
    }
)
# name -> (family, what differs from SIZES)
VARIANTS = MappingProxyType(
    {
        "llama": ("llama", {}),
        "llama-mha": ("llama", {"num_key_value_heads": 4}),
        "llama-tied": ("llama", {"tie_word_embeddings": True}),
        "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
        "llama-wide-heads": ("llama", {"head_dim": 16}),
        "llama-gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-3}),
        "qwen2": ("qwen2", {}),
        "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
        **{
            f"rope-{kind}": ("llama", {"rope_parameters": {"rope_theta": 5000.0, **parameters}})
            for kind, parameters in ROPES.items()
        },
    }
)
CLASSES = MappingProxyType(
    {
        ("llama", "lm"): (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        ("llama", "score"): (transformers.LlamaConfig, transformers.LlamaForSequenceClassification),
        ("qwen2", "lm"): (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        ("qwen2", "score"): (transformers.Qwen2Config, transformers.Qwen2ForSequenceClassification),
    }
)


@dataclass(frozen=True)
class Saved:
    """A `transformers` model in fp32 and the folder it was saved to."""

    folder: Path
    model: Any


@pytest.fixture(autouse=True, scope="session")
def _no_progress_bars() -> Iterator[None]:
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def build(name: str, kind: str, **changes: Any) -> Any:
    """A random model whose biases and norms are random too: zeros and ones would hide mistakes."""
    family, differs = VARIANTS[name]
    config_class, model_class = CLASSES[family, kind]
    labels = {"num_labels": 1} if kind == "score" else {}
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **differs, **labels, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """`saved(variant, kind="lm" | "score")` -> `Saved`; the same folder each time, so read it only."""
    ready: dict[tuple[str, str], Saved] = {}

    def get(name: str, kind: str = "lm") -> Saved:
        if (name, kind) not in ready:
            model = build(name, kind)
            folder = tmp_path_factory.mktemp(f"{name}-{kind}")
            model.save_pretrained(folder)
            ready[name, kind] = Saved(folder, model)
        return ready[name, kind]

    return get


@pytest.fixture(scope="session")
def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    return dict(VARIANTS)
