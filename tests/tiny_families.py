"""Random decoders of every family, whose heads, columns and vocabulary divide by nothing: for cutting them."""

from types import MappingProxyType

import torch
from tiny_tables import SIZES

from meshift.models.decoder import Decoder
from meshift.models.hf.families import FAMILIES, read_config

LOCAL = ("sliding_attention", "full_attention", "sliding_attention")
NO_TOKENS = MappingProxyType(dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))
# name -> (family, what differs from the sizes of all): each family at its richest
MODELS = MappingProxyType(
    {
        "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
        "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
        "qwen2": ("qwen2", {}),
        "qwen3": ("qwen3", {"tie_word_embeddings": True}),
        "mistral": ("mistral", {"sliding_window": 4}),
        "olmo2": ("olmo2", {"num_key_value_heads": 2}),
        "phi3": ("phi3", {}),
        "gemma": ("gemma", {"tie_word_embeddings": True}),
        "gemma2": (
            "gemma2",
            {
                "sliding_window": 4,
                "attn_logit_softcapping": 0.5,
                "query_pre_attn_scalar": 9,
                "num_key_value_heads": 2,
            },
        ),
        "gemma3": (
            "gemma3_text",
            {
                "sliding_window": 4,
                "layer_types": list(LOCAL),
                "final_logit_softcapping": 1.5,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                },
            },
        ),
        "gpt2": ("gpt2", {"num_key_value_heads": None, "head_dim": None}),
    }
)


def family_model(name, head="lm", *, num_layers=3, dtype=torch.float32, seed=0) -> Decoder:
    """The same weights whenever it is built."""
    family, differs = MODELS[name]
    sizes = {**SIZES, "max_position_embeddings": 64, "num_hidden_layers": num_layers, **NO_TOKENS}
    raw = {"model_type": family, "architectures": [FAMILIES[family].causal], **sizes, **differs}
    model = Decoder(read_config(raw, "a test"), head).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draw) * 0.2
            parameter.copy_(noise if parameter.dim() > 1 else 1 + noise)
    return model.to(dtype)
