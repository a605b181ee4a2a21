"""From a llama-architecture GGUF file to a Hugging Face model folder; it knows nothing of downloads or
caches.

Weights are stored in bfloat16, the type SmolLM2 was released in. On the real model that adds at most 0.09
of the error that Q4_1 may already have made on the same block (0.02 by root mean square), 0.91 of Q8_0's
(0.20; only the embedding), and nothing on norms.
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meshift.counted import counted
from meshift.errors import ModelError

RECIPE_VERSION = 1
ARCHITECTURE = "llama"
SPECIAL, USER_DEFINED = (
    3,
    4,
)  # tokenizer.ggml.token_type: a control token; a whole-word token that is plain text

# GGUF name -> Hugging Face name, outside the blocks and inside block {i}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def import_gguf(path: Path, folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config, weights (in `dtype`), tokenizer and generation config of the GGUF at `path` into
    `folder`.

    Raises ModelError where the file is unreadable, not of the llama architecture, or holds a tensor or
    setting that this import does not know, and where the `gguf` package is missing (naming the extra that
    has it).
    """
    gguf = _gguf()
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not a readable GGUF file ({error}): obtain it again.") from error
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = read_config(metadata, {tensor.name: tensor.shape for tensor in reader.tensors}, str(path))
    weights = dict(_weights(gguf, reader, config, str(path), dtype))
    _check_complete(weights, config, str(path))
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)
    build_tokenizer(metadata, str(path)).save_pretrained(folder)


def missing_extra(module: str) -> ModelError:
    """The error for a package that only the `quickstart` extra installs."""
    return ModelError(
        f"the package {module!r}, which reads the quickstart's model, is not installed: "
        "run `pip install 'meshift[quickstart]'`."
    )


def read_config(metadata: dict[str, Any], shapes: dict[str, Any], where: str) -> dict[str, Any]:
    """The `config.json` of a llama, from GGUF metadata and tensor shapes (GGUF order: in, out)."""
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ModelError(
            f"{where} is of the architecture {architecture!r}: only {ARCHITECTURE!r} can be imported."
        )
    scaling = sorted(key for key in metadata if key.startswith("llama.rope.scaling."))
    if scaling:
        raise ModelError(f"{where} sets {scaling[0]}, which this import does not know: use a Hugging Face folder.")
    try:
        return _llama_config(metadata, shapes)
    except KeyError as error:
        raise ModelError(f"{where} lacks {error.args[0]}: it is incomplete, obtain it again.") from error


def build_tokenizer(metadata: dict[str, Any], where: str) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer in the GGUF metadata, with its special tokens and chat template.

    The GGUF holds the pre-tokenizer by name only; 'smollm' splits each digit off before the byte-level split.
    """
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if (model, pre) != ("gpt2", "smollm"):
        raise ModelError(
            f"{where} has the tokenizer {model!r} with {pre!r}: only 'gpt2' with 'smollm' can be imported."
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    for token, kind in zip(tokens, types, strict=True):
        if kind in (SPECIAL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, special=kind == SPECIAL, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[_pad_id(metadata)],
        unk_token=tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)],
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's reordering of query and key rows. `[num_heads * head_dim, hidden]`, same shape out.

    llama.cpp rotates neighbouring rows (2j, 2j + 1) of a head, transformers rows (j, j + head_dim / 2).
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def _gguf() -> ModuleType:
    try:
        return importlib.import_module("gguf")
    except ModuleNotFoundError as error:
        raise missing_extra("gguf") from error


def _llama_config(metadata: dict[str, Any], shapes: dict[str, Any]) -> dict[str, Any]:
    def setting(name: str) -> Any:
        return metadata[f"{ARCHITECTURE}.{name}"]

    num_heads = setting("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": int(shapes["token_embd.weight"][1]),
        "hidden_size": setting("embedding_length"),
        "intermediate_size": setting("feed_forward_length"),
        "num_hidden_layers": setting("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": setting("rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": setting("context_length"),
        "rms_norm_eps": _shortest(setting("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": _pad_id(metadata),
    }


def _pad_id(metadata: dict[str, Any]) -> int:
    eos_id: int = metadata["tokenizer.ggml.eos_token_id"]
    return metadata.get("tokenizer.ggml.padding_token_id", eos_id)


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.999999747378752e-06 was once written 1e-05."""
    return float(str(np.float32(value)))


def _weights(
    gguf: ModuleType, reader: Any, config: dict[str, Any], where: str, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor at a time: the file is memory-mapped, so float32 copies never pile up."""
    for tensor in counted(reader.tensors, "tensors unpacked", lambda: len(reader.tensors)):
        name = _hf_name(tensor.name)
        if name is None:
            raise ModelError(f"{where} holds the tensor {tensor.name}, which this import does not know.")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        weight = torch.from_numpy(np.array(values) if values.base is not None else values)
        if name.endswith("q_proj.weight"):
            weight = unpermute(weight, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            weight = unpermute(weight, config["num_key_value_heads"])
        yield name, weight.to(dtype).contiguous()


def _hf_name(name: str) -> str | None:
    if not name.startswith("blk."):
        return OUTER.get(name)
    _, index, rest = name.split(".", 2)
    return f"model.layers.{index}.{INNER[rest]}" if rest in INNER else None


def _check_complete(weights: dict[str, torch.Tensor], config: dict[str, Any], where: str) -> None:
    wanted = {f"model.layers.{i}.{name}" for i in range(config["num_hidden_layers"]) for name in INNER.values()}
    wanted |= {"model.embed_tokens.weight", "model.norm.weight"}
    missing = sorted(wanted - weights.keys())
    if missing:
        raise ModelError(f"{where} lacks {missing[0]} ({len(missing)} missing in all): obtain it again.")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")
