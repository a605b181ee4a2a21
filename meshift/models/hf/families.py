"""Per-family data of Hugging Face models: architectures, how a config reads, how parameters are named.

Knows nothing of files or tensors. A new family is one more entry of `FAMILIES`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from meshift.errors import ModelError
from meshift.models.config import DecoderConfig, HeadKind


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells one family from another, as data.

    `defaults` are what `transformers` assumes for keys that config.json may leave out (None: derived from others).
    `biases` names, for `qkv`, `output` and `mlp`, the config key that switches the bias on, or says so itself.
    `refused` maps a config key to why it cannot be true. `names` maps our parameter names to theirs, without the
    head; `{i}` is the layer. `ignored` matches tensors that carry no weights.
    """

    name: str
    causal: str
    classifier: str
    defaults: Mapping[str, Any]
    biases: Mapping[str, str | bool]
    refused: Mapping[str, str]
    names: Mapping[str, str]
    ignored: str


REQUIRED_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
HEAD_NAMES: Mapping[HeadKind, str] = MappingProxyType(
    {"lm": "lm_head.weight", "value": "score.weight", "reward": "score.weight"}
)

_LLAMA_NAMES = MappingProxyType(
    {
        "embedding.": "model.embed_tokens.",
        "layers.{i}.attention_norm.": "model.layers.{i}.input_layernorm.",
        "layers.{i}.attention.query.": "model.layers.{i}.self_attn.q_proj.",
        "layers.{i}.attention.key.": "model.layers.{i}.self_attn.k_proj.",
        "layers.{i}.attention.value.": "model.layers.{i}.self_attn.v_proj.",
        "layers.{i}.attention.output.": "model.layers.{i}.self_attn.o_proj.",
        "layers.{i}.mlp_norm.": "model.layers.{i}.post_attention_layernorm.",
        "layers.{i}.mlp.gate.": "model.layers.{i}.mlp.gate_proj.",
        "layers.{i}.mlp.up.": "model.layers.{i}.mlp.up_proj.",
        "layers.{i}.mlp.down.": "model.layers.{i}.mlp.down_proj.",
        "norm.": "model.norm.",
    }
)
# Checkpoints from before 2023 carry the rotary frequencies of every layer.
_ROTARY_BUFFERS = r".*\.rotary_emb\.inv_freq"

LLAMA = Family(
    name="llama",
    causal="LlamaForCausalLM",
    classifier="LlamaForSequenceClassification",
    defaults=MappingProxyType(
        {
            "num_key_value_heads": None,
            "head_dim": None,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
        }
    ),
    biases=MappingProxyType({"qkv": "attention_bias", "output": "attention_bias", "mlp": "mlp_bias"}),
    refused=MappingProxyType({}),
    names=_LLAMA_NAMES,
    ignored=_ROTARY_BUFFERS,
)

QWEN2 = Family(
    name="qwen2",
    causal="Qwen2ForCausalLM",
    classifier="Qwen2ForSequenceClassification",
    defaults=MappingProxyType(
        {
            "num_key_value_heads": 32,
            "head_dim": None,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
        }
    ),
    biases=MappingProxyType({"qkv": True, "output": False, "mlp": False}),
    refused=MappingProxyType(
        {
            "use_sliding_window": "sliding-window attention is not supported yet; if all sequences are shorter "
            "than its sliding_window, set use_sliding_window to false"
        }
    ),
    names=_LLAMA_NAMES,
    ignored=_ROTARY_BUFFERS,
)

FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in (LLAMA, QWEN2)})


def find_family(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a raw config.json, by `architectures`, else by `model_type`. Raises `ModelError`."""
    named = raw.get("architectures") or ()
    for family in FAMILIES.values():
        if family.causal in named or family.classifier in named:
            return family
    if not named and raw.get("model_type") in FAMILIES:
        return FAMILIES[raw["model_type"]]
    found = ", ".join(named) or f"model_type '{raw.get('model_type')}'"
    supported = ", ".join(name for f in FAMILIES.values() for name in (f.causal, f.classifier))
    raise ModelError(f"{where} is of an unsupported architecture ({found}); supported are {supported}.")


def read_config(raw: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None) -> DecoderConfig:
    """Translate a raw config.json; `where` names it in errors. Raises `ModelError`."""
    try:
        return _translate(raw, where, generation)
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            f"{where} cannot be read ({type(error).__name__}: {error}): a value in it is of the wrong type, so "
            "copy the file from its source again."
        ) from error


def _translate(raw: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None) -> DecoderConfig:
    family = find_family(raw, where)
    missing = [key for key in REQUIRED_KEYS if raw.get(key) is None]
    if missing:
        raise ModelError(f"{where} lacks the key '{missing[0]}', which is needed to build the model.")
    _refuse(family, raw, where)
    values = {**family.defaults, **raw}
    num_heads = values["num_attention_heads"]
    biases = {part: bool(values[key] if isinstance(key, str) else key) for part, key in family.biases.items()}
    config = DecoderConfig(
        family=family.name,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=values["num_key_value_heads"] or num_heads,
        head_dim=values["head_dim"] or values["hidden_size"] // num_heads,
        norm_eps=values["rms_norm_eps"],
        tie_word_embeddings=bool(values["tie_word_embeddings"]),
        qkv_bias=biases["qkv"],
        output_bias=biases["output"],
        mlp_bias=biases["mlp"],
        activation=values["hidden_act"],
        max_positions=values["max_position_embeddings"],
        hf=raw,
        generation=generation,
    )
    _check_sizes(config, where)
    return config


def hf_name(config: DecoderConfig, head: HeadKind, name: str) -> str:
    """Their name of one of our parameters, e.g. `norm.weight` -> `model.norm.weight`."""
    if name == "head.weight":
        return HEAD_NAMES[head]
    index = re.match(r"layers\.(\d+)\.", name)
    template = name if index is None else f"layers.{{i}}.{name[index.end() :]}"
    prefix, dot, kind = template.rpartition(".")
    theirs = FAMILIES[config.family].names[prefix + dot] + kind
    return theirs if index is None else theirs.replace("{i}", index[1])


def _refuse(family: Family, raw: Mapping[str, Any], where: str) -> None:
    for key, reason in family.refused.items():
        if raw.get(key):
            raise ModelError(f"{where} sets {key}, but {reason}.")
    if raw.get("quantization_config"):
        raise ModelError(
            f"{where} describes a quantised model; training needs plain weights, so dequantise it first."
        )


def _check_sizes(config: DecoderConfig, where: str) -> None:
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "max_positions")
    for key in (*sizes, "num_layers", "num_heads", "num_kv_heads"):
        value = getattr(config, key)
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"{where}: {key} must be a whole number above zero, not {value!r}.")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: {config.num_heads} attention heads cannot share {config.num_kv_heads} key-value heads "
            "evenly."
        )
    if config.head_dim < 2 or config.head_dim % 2:
        raise ModelError(f"{where}: rotary position embedding needs an even head_dim, not {config.head_dim}.")
