"""GPT-2: learned positions, layer norm, a plain MLP, and matrices stored transposed.

Knows nothing of files or tensors.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from meshift.models.hf.family import Family


def _gpt2(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "intermediate_size": values["n_inner"] or 4 * values["n_embd"],
        "query_scale": None if values["scale_attn_weights"] else 1.0,
    }


_MATRICES = {
    "layers.{i}.attention.query.": "transformer.h.{i}.attn.c_attn.",
    "layers.{i}.attention.key.": "transformer.h.{i}.attn.c_attn.",
    "layers.{i}.attention.value.": "transformer.h.{i}.attn.c_attn.",
    "layers.{i}.attention.output.": "transformer.h.{i}.attn.c_proj.",
    "layers.{i}.mlp.up.": "transformer.h.{i}.mlp.c_fc.",
    "layers.{i}.mlp.down.": "transformer.h.{i}.mlp.c_proj.",
}

GPT2 = Family(
    name="gpt2",
    causal="GPT2LMHeadModel",
    classifier="GPT2ForSequenceClassification",
    defaults=MappingProxyType(
        {
            "n_inner": None,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "tie_word_embeddings": True,
        }
    ),
    spelled=MappingProxyType(
        {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
        }
    ),
    biases=MappingProxyType({"qkv": True, "output": True, "mlp": True}),
    refused=MappingProxyType(
        {
            "add_cross_attention": "there is no second text to attend to",
            "scale_attn_by_inverse_layer_idx": "a scale for each layer is not supported",
        }
    ),
    names=MappingProxyType(
        {
            **_MATRICES,
            "embedding.": "transformer.wte.",
            "embedding.position.": "transformer.wpe.",
            "layers.{i}.attention_norm.": "transformer.h.{i}.ln_1.",
            "layers.{i}.mlp_norm.": "transformer.h.{i}.ln_2.",
            "norm.": "transformer.ln_f.",
        }
    ),
    transposed=frozenset(_MATRICES),
    prefix="transformer.",
    # Causal masks that older versions of `transformers` kept with the weights.
    ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    fixed=MappingProxyType({"norm": "layer", "positions": "learned", "gated_mlp": False}),
    derived=_gpt2,
)
