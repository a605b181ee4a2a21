"""Llama and those that follow it closely: qwen2, qwen3, mistral, phi-3, olmo2.

Knows nothing of files or tensors.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from meshift.models.hf.family import (
    LLAMA_NAMES,
    QUERY_KEY_NORM_NAMES,
    SLIDING,
    Family,
    layer_types,
    windows_of,
)


def _window_everywhere(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Mistral and phi-3: `sliding_window` holds for every layer."""
    types = (SLIDING,) * values["num_hidden_layers"]
    return {"windows": windows_of(types, values["sliding_window"])}


def _window_of_upper_layers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Qwen: with `use_sliding_window`, the layers of `layer_types`, else those from `max_window_layers` up."""
    if not values["use_sliding_window"]:
        return {}
    types = layer_types(values, lambda index: index >= values["max_window_layers"])
    return {"windows": windows_of(types, values["sliding_window"])}


_LLAMA_DEFAULTS = {
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
}
_QWEN_DEFAULTS = {
    **_LLAMA_DEFAULTS,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_ALL_BUT_MLP: dict[str, str | bool] = {"qkv": "attention_bias", "output": "attention_bias", "mlp": False}
_NO_BIAS: dict[str, str | bool] = {"qkv": False, "output": False, "mlp": False}

LLAMA = Family(
    name="llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    defaults=MappingProxyType({**_LLAMA_DEFAULTS, "attention_bias": False, "mlp_bias": False}),
    biases=MappingProxyType({"qkv": "attention_bias", "output": "attention_bias", "mlp": "mlp_bias"}),
    names=LLAMA_NAMES,
)

QWEN2 = Family(
    name="qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    defaults=MappingProxyType(_QWEN_DEFAULTS),
    biases=MappingProxyType({"qkv": True, "output": False, "mlp": False}),
    names=LLAMA_NAMES,
    derived=_window_of_upper_layers,
)

QWEN3 = Family(
    name="qwen3",
    causal="Qwen3ForCausalLM",
    classifier="Qwen3ForSequenceClassification",
    defaults=MappingProxyType({**_QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False}),
    biases=MappingProxyType(_ALL_BUT_MLP),
    names=MappingProxyType({**LLAMA_NAMES, **QUERY_KEY_NORM_NAMES}),
    fixed=MappingProxyType({"query_key_norm": "head"}),
    derived=_window_of_upper_layers,
)

MISTRAL = Family(
    name="mistral",
    causal="MistralForCausalLM",
    classifier="MistralForSequenceClassification",
    defaults=MappingProxyType(
        {
            **_LLAMA_DEFAULTS,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        }
    ),
    biases=MappingProxyType(_NO_BIAS),
    names=LLAMA_NAMES,
    derived=_window_everywhere,
)

PHI3 = Family(
    name="phi3",
    causal="Phi3ForCausalLM",
    classifier="Phi3ForSequenceClassification",
    defaults=MappingProxyType(
        {**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "sliding_window": None}
    ),
    biases=MappingProxyType(_NO_BIAS),
    names=MappingProxyType(
        {
            **LLAMA_NAMES,
            "layers.{i}.attention.query.": "model.layers.{i}.self_attn.qkv_proj.",
            "layers.{i}.attention.key.": "model.layers.{i}.self_attn.qkv_proj.",
            "layers.{i}.attention.value.": "model.layers.{i}.self_attn.qkv_proj.",
            "layers.{i}.mlp.gate.": "model.layers.{i}.mlp.gate_up_proj.",
            "layers.{i}.mlp.up.": "model.layers.{i}.mlp.gate_up_proj.",
        }
    ),
    fixed=MappingProxyType({"partial_rotary": True}),
    derived=_window_everywhere,
)

OLMO2 = Family(
    name="olmo2",
    causal="Olmo2ForCausalLM",
    classifier="Olmo2ForSequenceClassification",
    defaults=MappingProxyType({**_LLAMA_DEFAULTS, "rms_norm_eps": 1e-5, "attention_bias": False}),
    biases=MappingProxyType(_ALL_BUT_MLP),
    names=MappingProxyType(
        {
            **LLAMA_NAMES,
            **QUERY_KEY_NORM_NAMES,
            "layers.{i}.attention_post_norm.": "model.layers.{i}.post_attention_layernorm.",
            "layers.{i}.mlp_post_norm.": "model.layers.{i}.post_feedforward_layernorm.",
        }
    ),
    fixed=MappingProxyType({"query_key_norm": "projection", "norm_places": "after"}),
)
