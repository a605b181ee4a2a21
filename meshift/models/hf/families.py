"""The families of Hugging Face models that Meshift runs, and how their config.json reads.

Knows nothing of files or tensors. A new family is one more entry of `FAMILIES`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from meshift.errors import ModelError, shown
from meshift.models.config import DecoderConfig, HeadKind
from meshift.models.hf.family import Family, name_template
from meshift.models.hf.gemma_family import GEMMA, GEMMA2, GEMMA3
from meshift.models.hf.gpt2_family import GPT2
from meshift.models.hf.llama_family import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3

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

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {family.name: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, PHI3, OLMO2, GEMMA, GEMMA2, GEMMA3, GPT2)}
)


COUNTED, MOST = ("num_hidden_layers", "n_layer", "num_labels"), 10_000
"""What is made one by one, and how many at most: a number without end in a spoiled file would fill the memory."""


def find_family(raw: Mapping[str, Any], where: str) -> Family:
    """The family of a raw config.json, by `architectures`, else by `model_type`. Raises `ModelError`."""
    named = raw.get("architectures") or ()
    if not isinstance(named, list | tuple) or not all(
        isinstance(name, str) and name.isidentifier() for name in named
    ):
        raise ModelError(
            f"{where}: architectures must be a list of names, not {shown(named)}; copy that file from its "
            "source again."
        )
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
    for key in COUNTED:
        count = raw.get(key)
        if isinstance(count, int | float) and count > MOST:
            raise ModelError(
                f"{where}: {key} is above {MOST:,}, more than any model has; copy that file from its source again."
            )
    try:
        return _translate(raw, where, generation)
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError) as error:
        raise ModelError(
            f"{where} cannot be read ({type(error).__name__}: {error}): a value in it is wrong, so copy the file "
            "from its source again."
        ) from error


def _translate(raw: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None) -> DecoderConfig:
    family = find_family(raw, where)
    _refuse(family, raw, where)
    values = _values(family, raw, where)

    def value(key: str) -> Any:
        return values.get(family.spelled.get(key, key))

    num_heads = value("num_attention_heads")
    biases = {part: bool(values[key] if isinstance(key, str) else key) for part, key in family.biases.items()}
    fields = {
        "intermediate_size": value("intermediate_size"),
        "activation": value("hidden_act"),
        **family.fixed,
        **family.derived(values),
    }
    config = DecoderConfig(
        family=family.name,
        vocab_size=values["vocab_size"],
        hidden_size=value("hidden_size"),
        num_layers=value("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=value("num_key_value_heads") or num_heads,
        head_dim=value("head_dim") or value("hidden_size") // num_heads,
        norm_eps=value("rms_norm_eps"),
        tie_word_embeddings=bool(value("tie_word_embeddings")),
        qkv_bias=biases["qkv"],
        output_bias=biases["output"],
        mlp_bias=biases["mlp"],
        max_positions=value("max_position_embeddings"),
        hf=raw,
        generation=generation,
        **fields,
    )
    _check_sizes(config, where)
    return config


def hf_name(config: DecoderConfig, head: HeadKind, name: str) -> str:
    """Their name of the tensor that holds one of our parameters, e.g. `norm.weight` -> `model.norm.weight`."""
    if name == "head.weight":
        return HEAD_NAMES[head]
    module, kind, index = name_template(name)
    return (FAMILIES[config.family].names[module] + kind).replace("{i}", index)


def _values(family: Family, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config's values, by the family's own names of the keys, with what `transformers` assumes."""
    spelled = family.spelled.items()
    renamed = {theirs: raw[general] for general, theirs in spelled if general in raw and theirs not in raw}
    values = {**family.defaults, **renamed, **raw}
    for key in REQUIRED_KEYS:
        name = family.spelled.get(key, key)
        if values.get(name) is None and name not in family.defaults:
            raise ModelError(f"{where} lacks the key '{name}', which is needed to build the model.")
    return values


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
            raise ModelError(f"{where}: {key} must be a whole number above zero, not {shown(value)}.")
    if config.num_heads % config.num_kv_heads:
        raise ModelError(
            f"{where}: {config.num_heads} attention heads cannot share {config.num_kv_heads} key-value heads "
            "evenly."
        )
    if config.positions == "rotary" and (config.head_dim < 2 or config.head_dim % 2):
        raise ModelError(f"{where}: rotary position embedding needs an even head_dim, not {config.head_dim}.")
    for key in ("attention_softcap", "logit_softcap", "query_scale"):
        cap = getattr(config, key)
        if cap is not None and not (isinstance(cap, float | int) and cap > 0):
            raise ModelError(f"{where}: {key} must be a number above zero, or null, not {shown(cap)}.")
