"""Adapter folders in PEFT's format: read as a base model's weights with the adapter in them, and written.

`adapter_config.json` names the base, the rank and the modules; `adapter_model.safetensors` holds `lora_A` and
`lora_B` of each. Knows nothing of how adapters are trained.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshift.errors import ModelError
from meshift.models.config import Adapter, DecoderConfig
from meshift.models.decoder import Decoder
from meshift.models.hf.adapter_targets import ends_in, modules_of
from meshift.models.hf.families import FAMILIES, HEAD_NAMES
from meshift.models.hf.files import WeightFiles, read_json, resolve_model
from meshift.models.hf.stored import stored_tensors
from meshift.models.linear import merge
from meshift.models.shards import LORA_A, LORA_B

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
REFUSED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "target_parameters",
)
"""What of PEFT's LoRA changes the sum W + scale B A, or what it is added to."""


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """An adapter's folder: what its config says, and the folder of the model that it is for."""

    directory: Path
    settings: Mapping[str, Any]
    model: Path

    @property
    def has_score(self) -> bool:
        """Whether the adapted model is a reward model or a critic."""
        return self.settings.get("task_type") == "SEQ_CLS"

    def scale(self, module: str, rank: int) -> float:
        """What B A of a module is multiplied by."""
        alphas = self.settings.get("alpha_pattern") or {}
        found = [alpha for pattern, alpha in alphas.items() if re.fullmatch(rf"(.*\.)?({pattern})", module)]
        alpha = float(found[0] if found else self.settings["lora_alpha"])
        return alpha / (rank**0.5 if self.settings.get("use_rslora") else rank)


def is_adapter(directory: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (directory / CONFIG).is_file() and not (directory / "config.json").is_file()


def loading_by_peft(directory: Path) -> str | None:
    """The expression by which `peft` loads an adapter's folder; None where it is no adapter's.

    `AutoPeftModel...` makes the base as `transformers` does, which gives a language model's folder a score head of
    two labels unless it is told of one.
    """
    if not is_adapter(directory):
        return None
    scores = read_json(directory / CONFIG).get("task_type") == "SEQ_CLS"
    kind, more = ("SequenceClassification", ", num_labels=1") if scores else ("CausalLM", "")
    return f'AutoPeftModelFor{kind}.from_pretrained("{directory}"{more})'


def find_adapter(directory: Path) -> AdapterFolder | None:
    """The adapter that a folder holds, its base found; None where it is no adapter's. Raises `ModelError`."""
    if not is_adapter(directory):
        return None
    settings, where = read_json(directory / CONFIG), directory / CONFIG
    if settings.get("peft_type") != "LORA" or settings.get("bias", "none") != "none":
        raise ModelError(
            f"{where} is of no plain LoRA adapter; merge it with peft's merge_and_unload, and save that."
        )
    for key in REFUSED:
        if settings.get(key):
            raise ModelError(f"{where} sets {key}, which is not read; merge it with peft's merge_and_unload.")
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or not isinstance(settings.get("lora_alpha"), int | float):
        raise ModelError(
            f"{where} lacks base_model_name_or_path or lora_alpha; copy the adapter from its source again."
        )
    try:
        folder = _model_folder(name)
    except ModelError as error:
        raise ModelError(f"{where} is an adapter for '{name}', which cannot be had: {error}") from None
    return AdapterFolder(directory=directory, settings=settings, model=folder)


@cache
def _model_folder(name: str) -> Path:
    """Looked for once only: it may be on the hub."""
    return resolve_model(name)


class AdaptedWeights:
    """The tensors of a base model with an adapter in them, as `WeightFiles` gives those of a folder.

    Sums are in fp32, for whoever reads them to round. Raises `ModelError` where the adapter is for another model.
    """

    def __init__(
        self, adapter: AdapterFolder, beneath: "WeightFiles | AdaptedWeights", config: DecoderConfig
    ) -> None:
        self.directory = adapter.directory
        self._adapter, self._beneath = adapter, beneath
        self._held = _read_held(adapter.directory)
        prefix = FAMILIES[config.family].prefix
        self._pairs: dict[str, str] = {}  # name of a base's weight -> the module in the adapter's names
        self._whole: dict[str, Tensor] = {}
        for key in self._held:
            found = KEY.fullmatch(key)
            if found is None:
                self._whole[self._name_of_whole(key)] = self._held[key]
                continue
            module = found[1]
            names = (f"{module}.weight", f"{module.removeprefix(prefix)}.weight")
            name = next((name for name in names if name in beneath.shapes), None)
            if name is None or f"{PREFIX}{module}.lora_{'AB'[found[2] == 'A']}.weight" not in self._held:
                raise ModelError(
                    f"{adapter.directory}: {key} has no counterpart in {adapter.model}: it is for another."
                )
            self._pairs[name] = module
        stored = stored_tensors(config, "lm")
        bare = {name.removeprefix(prefix): held for name, held in stored.items()}
        self._transposed = {name for name, held in {**bare, **stored}.items() if held.transposed}
        self.shapes: dict[str, tuple[int, ...]] = {
            **beneath.shapes,
            **{name: tuple(tensor.shape) for name, tensor in self._whole.items()},
        }

    def _name_of_whole(self, key: str) -> str:
        """Of what is kept as it is, beside adapters: the score head, and nothing else."""
        if key != PREFIX + HEAD_NAMES["reward"]:
            raise ModelError(
                f"{self.directory}: {key} is no linear layer's adapter and no score head; it is not read."
            )
        return HEAD_NAMES["reward"]

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """See `WeightFiles`."""
        wanted = set(names)
        for name in wanted & self._whole.keys():
            yield name, self._whole[name]
        for name, tensor in self._beneath.read(wanted - self._whole.keys()):
            yield name, self._sum(name, tensor) if name in self._pairs else tensor

    def _sum(self, name: str, weight: Tensor) -> Tensor:
        module = self._pairs[name]
        a, b = (self._held[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        flat = weight.T if name in self._transposed else weight
        if flat.shape != (b.shape[0], a.shape[1]) or b.shape[1] != a.shape[0]:
            raise ModelError(
                f"{self.directory}: the adapter of {module} is {list(b.shape)} times {list(a.shape)}, but {name} "
                f"is {list(weight.shape)}: it is for another model."
            )
        whole = merge(flat, a, b, self._adapter.scale(module, a.shape[0]))
        return whole.T if name in self._transposed else whole


def _read_held(directory: Path) -> dict[str, Tensor]:
    if not (directory / WEIGHTS).is_file():
        raise ModelError(
            f"{directory} holds no {WEIGHTS}; pickled adapters are not read, so save it again with peft."
        )
    files = WeightFiles(directory, (directory / WEIGHTS,))
    return {name: tensor.clone() for name, tensor in files.read(files.shapes)}


def adapter_tensors(model: Decoder) -> dict[str, Tensor]:
    """What `adapter_model.safetensors` holds of a model, on the CPU.

    Where several of our layers lie in one module, its A has theirs one below another, and its B theirs on the
    diagonal: the same sum, of a rank that is as many times as high.
    """
    adapter, parameters = _adapter_of(model), dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    for layer in range(adapter.first_layer, model.config.num_layers):
        for module, own in _targeted(model.config, adapter).items():
            pairs = [[parameters[f"layers.{layer}.{n}.{side}"].detach() for n in own] for side in (LORA_A, LORA_B)]
            name = PREFIX + module.replace("{i}", str(layer))
            found[f"{name}.lora_A.weight"] = torch.cat(pairs[0]).cpu().contiguous()
            found[f"{name}.lora_B.weight"] = torch.block_diag(*pairs[1]).cpu().contiguous()
    if model.head_kind != "lm":
        found[PREFIX + HEAD_NAMES[model.head_kind]] = parameters["head.weight"].detach().cpu().contiguous()
    return found


def adapter_settings(model: Decoder) -> dict[str, Any]:
    """What `adapter_config.json` says of a model's adapters."""
    adapter, targeted = _adapter_of(model), _targeted(model.config, _adapter_of(model))
    joined = {module: len(own) for module, own in targeted.items() if len(own) > 1}
    names = {module: _short_name(module, model.config, targeted) for module in targeted}
    root = adapter.rank_stabilized
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.head_kind == "lm" else "SEQ_CLS",
        "base_model_name_or_path": adapter.made_for,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": _whole_if_whole(adapter.alpha),
        "use_rslora": root,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "fan_in_fan_out": bool(FAMILIES[model.config.family].transposed),
        "target_modules": sorted(set(names.values())),
        "modules_to_save": None if model.head_kind == "lm" else ["score"],
        "layers_to_transform": list(range(adapter.first_layer, model.config.num_layers))
        if adapter.first_layer
        else None,
        "rank_pattern": {names[module]: adapter.rank * count for module, count in joined.items()},
        "alpha_pattern": {
            names[module]: _whole_if_whole(adapter.alpha * (count**0.5 if root else count))
            for module, count in joined.items()
        },
    }


def _adapter_of(model: Decoder) -> Adapter:
    if model.config.adapter is None:
        raise ModelError("The model has no adapters to be saved.")
    return model.config.adapter


def _targeted(config: DecoderConfig, adapter: Adapter) -> dict[str, list[str]]:
    """Module with an adapter -> those of our linear layers that lie in it, in order."""
    found: dict[str, list[str]] = {}
    for own, module in modules_of(config).items():
        if own in adapter.targets:
            found.setdefault(module, []).append(own)
    return found


def _short_name(module: str, config: DecoderConfig, targeted: Mapping[str, Sequence[str]]) -> str:
    """The last part of a module's name, or the last two where another module without an adapter has it too."""
    parts = module.split(".")
    alike = [other for other in set(modules_of(config).values()) if ends_in(other, parts[-1])]
    return parts[-1] if all(other in targeted for other in alike) else ".".join(parts[-2:])


def _whole_if_whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
