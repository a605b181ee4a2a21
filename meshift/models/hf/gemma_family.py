"""Gemma 1, 2 and 3 (text): norms that count from one, scaled embeddings, caps, and windows by layer.

Knows nothing of files or tensors.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from meshift.models.hf.family import LLAMA_NAMES, QUERY_KEY_NORM_NAMES, Family, layer_types, windows_of


def _gemma(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Old files say `gelu` and mean its approximation by tanh."""
    activation = "gelu_pytorch_tanh" if values["hidden_act"] == "gelu" else values["hidden_act"]
    return {"embedding_scale": values["hidden_size"] ** 0.5, "activation": activation}


def _gemma2(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every other layer has a window, from the first on, unless `layer_types` says otherwise."""
    return _capped(values, layer_types(values, lambda index: index % 2 == 0))


def _gemma3(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """All but each sixth layer have a window, and rotary frequencies of their own."""
    types = layer_types(values, lambda index: bool((index + 1) % values["sliding_window_pattern"]))
    return {**_capped(values, types), "rotary_types": types}


def _capped(values: Mapping[str, Any], types: Sequence[str]) -> Mapping[str, Any]:
    return {
        "embedding_scale": values["hidden_size"] ** 0.5,
        "query_scale": values["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": values["attn_logit_softcapping"],
        "logit_softcap": values["final_logit_softcapping"],
        "windows": windows_of(types, values["sliding_window"]),
    }


_BIASES: dict[str, str | bool] = {"qkv": "attention_bias", "output": "attention_bias", "mlp": False}
_REFUSED = {"use_bidirectional_attention": "only causal attention generates text"}
_DEFAULTS = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "max_position_embeddings": 8192,
}
_DEFAULTS_2 = {
    **_DEFAULTS,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
_FOUR_NORMS = {
    **LLAMA_NAMES,
    "layers.{i}.attention_post_norm.": "model.layers.{i}.post_attention_layernorm.",
    "layers.{i}.mlp_norm.": "model.layers.{i}.pre_feedforward_layernorm.",
    "layers.{i}.mlp_post_norm.": "model.layers.{i}.post_feedforward_layernorm.",
}

GEMMA = Family(
    name="gemma",
    causal="GemmaForCausalLM",
    classifier="GemmaForSequenceClassification",
    defaults=MappingProxyType({**_DEFAULTS, "num_key_value_heads": 16, "hidden_act": "gelu_pytorch_tanh"}),
    biases=MappingProxyType(_BIASES),
    refused=MappingProxyType(_REFUSED),
    names=LLAMA_NAMES,
    fixed=MappingProxyType({"norm": "rms_plus_one"}),
    derived=_gemma,
)

GEMMA2 = Family(
    name="gemma2",
    causal="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    defaults=MappingProxyType(_DEFAULTS_2),
    spelled=MappingProxyType({"hidden_act": "hidden_activation"}),
    biases=MappingProxyType(_BIASES),
    refused=MappingProxyType(_REFUSED),
    names=MappingProxyType(_FOUR_NORMS),
    fixed=MappingProxyType({"norm": "rms_plus_one", "norm_places": "both"}),
    derived=_gemma2,
)

GEMMA3 = Family(
    name="gemma3_text",
    causal="Gemma3ForCausalLM",
    classifier="Gemma3TextForSequenceClassification",
    defaults=MappingProxyType(
        {
            **_DEFAULTS_2,
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
            "sliding_window_pattern": 6,
        }
    ),
    spelled=MappingProxyType({"hidden_act": "hidden_activation"}),
    biases=MappingProxyType(_BIASES),
    refused=MappingProxyType(
        {**_REFUSED, "attn_logit_softcapping": "transformers does not cap the scores of Gemma 3; set it to null"}
    ),
    names=MappingProxyType({**_FOUR_NORMS, **QUERY_KEY_NORM_NAMES}),
    fixed=MappingProxyType({"norm": "rms_plus_one", "norm_places": "both", "query_key_norm": "head"}),
    derived=_gemma3,
)
