"""Tiny models with adapters that do something: B is drawn, not zero."""

import torch
from tiny_families import family_model

from meshift.config.sections import LoraConfig, TrainableConfig
from meshift.models.adapters import add_adapter
from meshift.models.config import Adapter
from meshift.models.shards import is_adapters

RANK, ALPHA = 3, 4.5


@torch.no_grad()
def adapt(model, targets=None, *, rank=RANK, seed=1, **options):
    """Put adapters of rank 3 and scale 1.5 beside all linear layers, or those of these names."""
    wanted = targets or model.config.linear_names
    add_adapter(model, Adapter(rank=rank, alpha=ALPHA, targets=tuple(wanted), **options), seed)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def adapted_model(name, head="lm", targets=None, **options):
    """A family's model in the type that is asked for, with adapters."""
    return adapt(family_model(name, head, **options), targets)


def with_lora(config=None, **lora):
    """How a model is trained by adapters."""
    given = config or TrainableConfig()
    return given.model_copy(update={"lora": LoraConfig(**{"rank": RANK, "alpha": ALPHA, **lora})})


def adapters_in(tensors):
    """Those of adapters, of parameters or gradients by name."""
    return {name: tensor for name, tensor in tensors.items() if is_adapters(name)}
