"""The linear layers that a config's `lora` puts adapters beside, by the names that a family's model files have.

It knows nothing of tensors or files, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshift.config.sections import LoraConfig
from meshift.errors import ModelError
from meshift.models.config import Adapter, DecoderConfig
from meshift.models.hf.families import FAMILIES


def adapter_for(config: DecoderConfig, lora: LoraConfig, first_layer: int = 0) -> Adapter:
    """What `lora` asks for, for this model. Raises `ModelError` for a module that is not there."""
    every = lora.target_modules == "all-linear"
    return Adapter(
        rank=lora.rank,
        alpha=lora.alpha,
        targets=config.linear_names if every else targets_of(config, lora.target_modules),
        first_layer=first_layer,
        rank_stabilized=lora.rank_stabilized,
    )


def targets_of(config: DecoderConfig, wanted: Sequence[str]) -> tuple[str, ...]:
    """Our linear layers whose Hugging Face modules these names end in; several of ours may lie in one module.

    Raises `ModelError` for a name that is no linear layer's.
    """
    modules = modules_of(config)
    for name in wanted:
        if not any(ends_in(module, name) for module in modules.values()):
            known = sorted({module.rpartition(".")[2] for module in modules.values()})
            raise ModelError(f"the model has no linear layer '{name}' in its layers; choose of {', '.join(known)}")
    return tuple(own for own, module in modules.items() if any(ends_in(module, name) for name in wanted))


def modules_of(config: DecoderConfig) -> dict[str, str]:
    """Our name of each linear layer within a layer -> the module it lies in, as `model.layers.{i}.mlp.up_proj`."""
    names = FAMILIES[config.family].names
    return {own: names[f"layers.{{i}}.{own}."].removesuffix(".") for own in config.linear_names}


def ends_in(module: str, name: str) -> bool:
    """Whether a module's name ends in these parts."""
    return f".{module}".endswith(f".{name}")
