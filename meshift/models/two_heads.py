"""A language model with a second head, for values: put on, and taken apart into two models.

Knows nothing of training or files.
"""

from dataclasses import replace

import torch
from torch import nn

from meshift.models.config import HeadKind
from meshift.models.decoder import Decoder
from meshift.models.heads import LanguageModelHead, ScalarHead
from meshift.models.shards import VALUE_HEAD


@torch.no_grad()
def add_value_head(model: Decoder) -> Decoder:
    """Give a whole language model a head for values that begins at zero, in place."""
    assert isinstance(model.head, LanguageModelHead)
    model.config = replace(model.config, value_head=True)
    head = ScalarHead(model.config).to(model.device, model.dtype)
    head.weight.zero_()
    model.head.value = head
    return model


def one_head_of(model: Decoder, kind: HeadKind) -> Decoder:
    """The language model (`lm`) or the critic (`value`) in a model of both, over the very same parameters."""
    config = replace(model.config, value_head=False)
    with torch.device("meta"):
        found = Decoder(config, kind)
    parameters = dict(model.named_parameters())
    if kind == "value":
        parameters["head.weight"] = parameters[VALUE_HEAD]
    for name, _ in list(found.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        parameter = parameters[name]
        assert isinstance(parameter, nn.Parameter)
        setattr(found.get_submodule(owner), leaf, parameter)
    return found.train(model.training)
