"""Tensor parallelism, applied from outside: a decoder written for one device gets a rank's part of its weights.

Which part is the shard table's to say. Linear layers whose output is cut (queries, keys, values, gate, up) work as
they are on fewer columns; those whose input is cut (output, down) give a part of a sum, which is taken over the
ranks; embedding and head go through a `Vocabulary`. (Shoeybi et al. 2019, arXiv:1909.08053; here with any sizes.)
It knows nothing of engines or optimizers: whose gradients must be added over ranks is said by `shared_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from meshift.layout.shard import Shard, Split
from meshift.models.decoder import Decoder, Layer
from meshift.models.heads import LanguageModelHead
from meshift.models.linear import SummedLinear
from meshift.models.norm import RMSNorm
from meshift.models.shards import is_adapters, shard_table
from meshift.parallel.collectives import beside, enter, leave, max_of, sum_both_ways, sum_of
from meshift.parallel.groups import Peers


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A parameter whose part here `num_holders` ranks hold: [bounds) along `dim` of the whole one of `shape`."""

    num_holders: int
    shape: tuple[int, ...]
    dim: int
    bounds: tuple[int, int]


class CutRMSNorm(RMSNorm):
    """The norm of rows of which each rank has some columns: the mean of squares is taken over all of them.

    `num_sharers` ranks have the same columns, which count once; `size` are all columns.
    """

    def __init__(self, whole: RMSNorm, size: int, num_sharers: int, peers: Peers) -> None:
        nn.Module.__init__(self)
        self.eps, self.weight = whole.eps, whole.weight
        self.size, self.num_sharers, self.peers = size, num_sharers, peers

    def forward(self, x: Tensor) -> Tensor:
        """[..., part] -> [..., part] in the same dtype."""
        wide = x.float()
        squares = wide.square().sum(-1, keepdim=True) / self.num_sharers
        mean = sum_both_ways(squares, self.peers) / self.size
        return (wide * (mean + self.eps).rsqrt() * self.weight.float()).to(x.dtype)


class CutVocabulary:
    """Rows [start, stop) of the vocabulary: see `meshift.models.vocabulary.Vocabulary`."""

    def __init__(self, split: Split, peers: Peers) -> None:
        bounds = [split.bounds(part, len(peers)) for part in range(len(peers))]
        self.start, self.stop = bounds[peers.index]
        self.widths = [stop - start for start, stop in bounds]
        self.peers = peers

    def look_up(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """See `Vocabulary`."""
        here, places = self._here(tokens)
        return leave(F.embedding(places, weight) * here.unsqueeze(-1).to(weight.dtype), self.peers)

    def enter(self, hidden: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return enter(hidden, self.peers)

    def columns(self, whole: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return whole[:, self.start : self.stop]

    def whole(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return beside(logits, self.widths, self.peers)

    def pick(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See `Vocabulary`."""
        here, places = self._here(targets[:, None])
        return sum_of(logits.gather(1, places).masked_fill(~here, 0.0), self.peers)

    def add_at(self, logits: Tensor, targets: Tensor, values: Tensor) -> None:
        """See `Vocabulary`."""
        here, places = self._here(targets[:, None])
        logits.scatter_add_(1, places, values * here)

    def likeliest(self, logits: Tensor) -> Tensor:
        """See `Vocabulary`: of several equal ones the first."""
        highest, places = logits.max(-1)
        everywhere = max_of(highest, self.peers)
        candidates = torch.where(highest == everywhere, -(places + self.start), -sum(self.widths))
        return -max_of(candidates, self.peers)

    def sum(self, parts: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return sum_of(parts, self.peers)

    def max(self, parts: Tensor) -> Tensor:
        """See `Vocabulary`."""
        return max_of(parts, self.peers)

    def _here(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens are in this part, and a place within it for each."""
        here = (tokens >= self.start) & (tokens < self.stop)
        return here, torch.where(here, tokens - self.start, 0)


@torch.no_grad()
def cut_model(model: Decoder, peers: Peers) -> Decoder:
    """Keep a rank's part of a whole decoder, in place, and let its layers work with their peers'.

    All of `peers` call it. A model on the `meta` device stays there: its parameters then have the part's shapes.
    Raises `LayoutError` where the model cannot be cut into so many parts.
    """
    if peers.group is None:
        return model
    table = shard_table(model.config, model.head_kind)
    for name, parameter in list(model.named_parameters()):
        split = table[name].split
        if split is not None:
            start, stop = split.bounds(peers.index, len(peers))
            part = parameter.narrow(split.dim, start, stop - start).clone()
            _replace(model, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        _cut_layer(layer, f"layers.{index}", table, peers)
    vocabulary = table["embedding.weight"].split
    assert vocabulary is not None
    model.embedding.vocabulary = CutVocabulary(vocabulary, peers)
    if isinstance(model.head, LanguageModelHead):
        model.head.vocabulary = model.embedding.vocabulary
    return model


def shared_parameters(model: Decoder, peers: Peers) -> dict[str, Shared]:
    """Parameters that several ranks hold alike while each has a part of their gradient.

    Key-value heads that several ranks share, norms of queries and keys head by head, and of an adapter the matrix
    that is not cut. What is not named here is held by one rank only, or has the same gradient everywhere.
    """
    found = {}
    for name, shard in shard_table(model.config, model.head_kind).items():
        split = shard.split
        if split is not None and len(peers) > split.num_units:  # key-value heads, fewer than ranks
            bounds, holders = split.bounds(peers.index, len(peers)), split.sharers(peers.index, len(peers))
            found[name] = Shared(num_holders=len(holders), shape=shard.shape, dim=split.dim, bounds=bounds)
        elif (
            split is None and len(peers) > 1 and ("query_norm" in name or "key_norm" in name or is_adapters(name))
        ):
            found[name] = Shared(num_holders=len(peers), shape=shard.shape, dim=0, bounds=(0, shard.shape[0]))
    return found


def add_shared(gradient: Tensor, shared: Shared, peers: Peers) -> None:
    """Make the gradient of a shared parameter's part the sum over its holders, in place. All of `peers` call it.

    The whole parameter's gradient is added up, of which each rank fills in its part: where key-value heads are
    fewer than ranks they are few, and no groups of holders are needed.
    """
    whole = gradient.new_zeros(shared.shape)
    part = whole.narrow(shared.dim, shared.bounds[0], shared.bounds[1] - shared.bounds[0])
    part.copy_(gradient)
    dist.all_reduce(whole, group=peers.group)
    gradient.copy_(part)


def _cut_layer(layer: Layer, prefix: str, table: Mapping[str, Shard], peers: Peers) -> None:
    for module in (layer.attention, layer.mlp):
        module.register_forward_pre_hook(lambda _, inputs: (enter(inputs[0], peers), *inputs[1:]))
    for child in layer.modules():
        if isinstance(child, nn.Linear):
            child.out_features, child.in_features = child.weight.shape
        if isinstance(child, SummedLinear):
            child.total = partial(leave, peers=peers)
    if layer.attention.query_norm is not None and not layer.attention.norm_by_head:
        for own in ("query_norm", "key_norm"):
            shard = table[f"{prefix}.attention.{own}.weight"]
            assert shard.split is not None
            sharers = shard.split.sharers(peers.index, len(peers))
            whole = getattr(layer.attention, own)
            setattr(layer.attention, own, CutRMSNorm(whole, shard.shape[0], len(sharers), peers))


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, parameter)
