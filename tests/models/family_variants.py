"""What tiny models the tests of families build: each family, and what its configs may switch on or off."""

from types import MappingProxyType

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
PHI3_FACTORS = MappingProxyType({"rope_type": "longrope", "short_factor": [1.0, 1.25], "long_factor": [2.0, 3.0]})
LOCAL = MappingProxyType({"layer_types": ["sliding_attention", "full_attention"]})
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
        "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        "qwen3": ("qwen3", {"head_dim": 16}),
        "qwen3-window": ("qwen3", {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5, **LOCAL}),
        "mistral": ("mistral", {"sliding_window": 6, "head_dim": 16}),
        "mistral-full": ("mistral", {"sliding_window": None}),
        "olmo2": ("olmo2", {}),
        "olmo2-mha": ("olmo2", {"num_key_value_heads": 4, "attention_bias": True}),
        "phi3": ("phi3", {}),
        "phi3-partial": (
            "phi3",
            {"sliding_window": 7, "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5}},
        ),
        "phi3-longrope": (
            "phi3",
            {
                "rope_parameters": {"rope_theta": 5000.0, "partial_rotary_factor": 0.5, **PHI3_FACTORS},
                "original_max_position_embeddings": 32,
                "tie_word_embeddings": True,
            },
        ),
        "gemma": ("gemma", {"head_dim": 16}),
        "gemma2": (
            "gemma2",
            {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 9},
        ),
        "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 9, **LOCAL}),
        "gemma3-scaled": (
            "gemma3_text",
            {
                "head_dim": 16,
                "sliding_window": 6,
                "final_logit_softcapping": 1.5,
                **LOCAL,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                },
            },
        ),
        "gpt2": ("gpt2", {"num_key_value_heads": None}),
        "gpt2-unscaled": ("gpt2", {"num_key_value_heads": None, "n_inner": 40, "scale_attn_weights": False}),
        **{
            f"rope-{kind}": ("llama", {"rope_parameters": {"rope_theta": 5000.0, **parameters}})
            for kind, parameters in ROPES.items()
        },
    }
)
LABELS = MappingProxyType({"lm": "ForCausalLM", "score": "ForSequenceClassification"})
STEMS = MappingProxyType(
    {
        "llama": "Llama",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "mistral": "Mistral",
        "olmo2": "Olmo2",
        "phi3": "Phi3",
        "gemma": "Gemma",
        "gemma2": "Gemma2",
    }
)
# family, kind -> the class of `transformers`
CLASSES = MappingProxyType(
    {
        **{(name, kind): f"{stem}{LABELS[kind]}" for name, stem in STEMS.items() for kind in LABELS},
        ("gemma3_text", "lm"): "Gemma3ForCausalLM",
        ("gemma3_text", "score"): "Gemma3TextForSequenceClassification",
        ("gpt2", "lm"): "GPT2LMHeadModel",
        ("gpt2", "score"): "GPT2ForSequenceClassification",
    }
)

# The richest variant of each family, for tests that need not see all of them.
EACH_FAMILY = (
    "llama-biases",
    "qwen2-window",
    "qwen3-window",
    "mistral",
    "olmo2-mha",
    "phi3-partial",
    "gemma",
    "gemma2",
    "gemma3-scaled",
    "gpt2",
)
