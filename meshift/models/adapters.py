"""Adapters put beside a decoder's linear layers, and the decoder without them.

What an adapter computes is `models/linear.py`'s, how it is cut `shards.py`'s. Knows nothing of training or files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from meshift.models.config import Adapter
from meshift.models.decoder import Decoder, Layer
from meshift.models.linear import Linear, merge
from meshift.models.shards import LORA_A, LORA_B, VALUE_HEAD, is_adapters


@torch.no_grad()
def add_adapter(model: Decoder, adapter: Adapter, seed: int = 0) -> Decoder:
    """Put a new adapter beside a whole model's linear layers, in place; the model computes what it did.

    A is drawn from `seed`, uniform within 1 / sqrt(in) of zero as `peft` draws it; B is zero.
    """
    model.config = replace(model.config, adapter=adapter)
    for layer in model.layers:
        assert isinstance(layer, Layer)
        layer.adapt(adapter)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not is_adapters(name):
            continue
        if name.endswith(LORA_A):
            numbers = torch.rand(parameter.shape, generator=draw) * 2 - 1
            parameter.copy_(numbers * parameter.shape[1] ** -0.5)
        else:
            parameter.zero_()
    return model


def without_adapter(model: Decoder) -> Decoder:
    """The model that the adapters are beside, with one head: a decoder of its own over the very same parameters.

    What is done to those is done to both. For whole models on one device.
    """
    config = replace(model.config, adapter=None, value_head=False)
    with torch.device("meta"):
        bare = Decoder(config, model.head_kind)
    for name, parameter in model.named_parameters():
        if not is_adapters(name) and name != VALUE_HEAD:
            owner, _, leaf = name.rpartition(".")
            setattr(bare.get_submodule(owner), leaf, parameter)
    return bare.train(model.training)


def share_frozen(model: Decoder, adapted: Decoder) -> Decoder:
    """Let a model of the same weights have those that another's adapters are beside, in place of its own.

    A head of its own stays: a score head is trained with adapters.
    """
    for name, parameter in adapted.named_parameters():
        if not is_adapters(name) and not name.startswith("head."):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)
    return model


class MergedWeights(Mapping[str, torch.Tensor]):
    """Parameters by name, those of adapters left out and summed into the matrices they are beside, in fp32.

    Each sum is made when it is asked for, so that there is one at a time.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor], adapter: Adapter) -> None:
        self._weights, self._scale = weights, adapter.scale

    def __getitem__(self, name: str) -> torch.Tensor:
        module = name.removesuffix(".weight")
        a, b = (self._weights.get(f"{module}.{own}") for own in (LORA_A, LORA_B))
        weight = self._weights[name]
        return weight if a is None or b is None else merge(weight, a, b, self._scale)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._weights if not is_adapters(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def merged_model(model: Decoder) -> Decoder:
    """As `without_adapter`, but the matrices that have adapters are copies with those merged in."""
    bare = without_adapter(model)
    for name, module in model.named_modules():
        if isinstance(module, Linear) and module.is_adapted:
            bare.get_submodule(name).weight = nn.Parameter(module.merged())
    return bare
