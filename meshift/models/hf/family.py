"""What a family of Hugging Face models is, as data; the families themselves are in the files beside this one.

Knows nothing of files or tensors.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from meshift.errors import shown

# Checkpoints from before 2023 carry the rotary frequencies of every layer.
ROTARY_BUFFERS = r".*\.rotary_emb\.inv_freq"


def nothing(_: object = None) -> Mapping[str, Any]:
    """For a family that is in this respect as llama is."""
    return MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Family:
    """What tells one family from another.

    `name` is the `model_type`; `causal` and `classifier` are the architectures. `defaults` are what `transformers`
    assumes for keys that config.json may leave out (None: derived from others). `spelled` maps a key to the name
    that this family gives it. `biases` names, for `qkv`, `output` and `mlp`, the config key that switches the bias
    on, or says so itself. `refused` maps a config key to why it cannot be true.

    `names` maps our parameter names to theirs, without the head; `{i}` is the layer. Several of ours with one
    name of theirs lie in that tensor one after another, in the order of the shard table. `transposed` are those of
    ours whose matrices are stored transposed (the whole tensor is, where several lie in one). All names of theirs
    begin with `prefix`, which a file of the bare decoder leaves out. `ignored` matches tensors without weights.

    `fixed` are fields of `DecoderConfig` that are the same for the whole family; `derived` makes others of the
    config's values.
    """

    name: str
    causal: str
    classifier: str
    defaults: Mapping[str, Any]
    biases: Mapping[str, str | bool]
    names: Mapping[str, str]
    spelled: Mapping[str, str] = field(default_factory=nothing)
    refused: Mapping[str, str] = field(default_factory=nothing)
    transposed: frozenset[str] = frozenset()
    prefix: str = "model."
    ignored: str = ROTARY_BUFFERS
    fixed: Mapping[str, Any] = field(default_factory=nothing)
    derived: Callable[[Mapping[str, Any]], Mapping[str, Any]] = nothing


LLAMA_NAMES: Mapping[str, str] = MappingProxyType(
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
QUERY_KEY_NORM_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "layers.{i}.attention.query_norm.": "model.layers.{i}.self_attn.q_norm.",
        "layers.{i}.attention.key_norm.": "model.layers.{i}.self_attn.k_norm.",
    }
)

SLIDING, FULL = "sliding_attention", "full_attention"


def name_template(name: str) -> tuple[str, str, str]:
    """`layers.3.mlp.up.weight` -> (`layers.{i}.mlp.up.`, `weight`, `3`); the last is empty outside layers."""
    index = re.match(r"layers\.(\d+)\.", name)
    template = name if index is None else f"layers.{{i}}.{name[index.end() :]}"
    module, dot, kind = template.rpartition(".")
    return module + dot, kind, "" if index is None else index[1]


def layer_types(values: Mapping[str, Any], otherwise: Callable[[int], bool]) -> tuple[str, ...]:
    """The type of each layer: as `layer_types` says, else sliding where `otherwise(index)` is true.

    Raises `ValueError` for types that are not known, or not one for each layer.
    """
    num_layers = values["num_hidden_layers"]
    types = values["layer_types"] or [SLIDING if otherwise(i) else FULL for i in range(num_layers)]
    if len(types) != num_layers:
        raise ValueError(f"layer_types has {len(types)} entries for {num_layers} layers")
    unknown = sorted(set(types) - {SLIDING, FULL})
    if unknown:
        raise ValueError(f"layer_types has {shown(unknown[0])}, but only {SLIDING} and {FULL} are supported")
    return tuple(types)


def windows_of(types: Sequence[str], window: int | None) -> tuple[int | None, ...]:
    """The window of each layer, by its type; none at all where no layer has one.

    Raises `ValueError` for a window that is no number of positions.
    """
    if SLIDING not in types or window is None:
        return ()
    if not isinstance(window, int) or window < 1:
        raise ValueError(f"sliding_window must be a whole number above zero or null, not {shown(window)}")
    return tuple(window if kind == SLIDING else None for kind in types)
