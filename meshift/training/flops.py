"""The floating-point operations of training, counted from shapes: what model FLOP utilisation divides by the peak.

Products of matrices and of attention, a multiplication and an addition each. Norms, rotary and the optimizer are
left out, and so is what `gradient_checkpointing` computes twice: more work is not more use. It knows nothing of
how fast a device is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from meshift.models.config import DecoderConfig
from meshift.models.decoder import Decoder, Layer
from meshift.models.linear import Linear


@dataclass(kw_only=True)
class Work:
    """What an engine's training has done so far: operations, and the seconds they took.

    Example: `Work(flops=6e12, seconds=1.5)`.
    """

    flops: float = 0.0
    seconds: float = 0.0


Spans = Sequence[tuple[int, int]]
"""Of pieces of sequences: how many rows come before, and how many are its own."""


def training_flops(model: Decoder, spans: Spans, num_read: int, num_last: int) -> float:
    """Forward and backward, with `num_read` rows through the head, and `num_last` rows that leave the last layer.

    Of a model that was cut, in the layers that are here; a gradient is taken to go to the layers before them.

    A product costs its forward, as much again for its inputs' gradient, and once more for its weights' gradient.
    Frozen layers that nothing trained lies under have no backward pass; a frozen head, and a frozen matrix beside
    an adapter, has one to its inputs only.
    """
    num_rows, total = sum(own for _, own in spans), 0.0
    learned_below = any(p.requires_grad for p in model.embedding.parameters()) or not model.embeds
    for layer in model.layers:
        assert isinstance(layer, Layer)
        index = layer.attention.layer.index
        learned = any(p.requires_grad for p in layer.parameters())
        before, after = _costs_of_row(layer, learned=learned, learned_below=learned_below)
        last = index == model.config.num_layers - 1  # of which leaves: products after attention see no other row
        total += num_rows * before + (num_last if last else num_rows) * after
        attention = _attention_flops(model.config, spans, model.config.window(index))
        total += attention * (3 if learned or learned_below else 1)
        learned_below = learned_below or learned
    return total + 2.0 * num_read * _num_head(model) * (2 + _learns_head(model)) * model.ends


def _costs_of_row(layer: Layer, *, learned: bool, learned_below: bool) -> tuple[float, float]:
    """Operations for a row in a layer's products before attention, and in those after."""
    own, norm = layer.attention, layer.attention_norm
    first = learned_below or (norm is not None and any(p.requires_grad for p in norm.parameters()))
    # Under the lowest adapters nothing is learned, so that what enters needs no gradient.
    first = first or (learned and own.query.weight.requires_grad)
    parts = (own.query, own.key, own.value)
    before = sum(_cost_of_row(part, goes_back=first) for part in parts)
    goes_back = learned or learned_below
    rest = _cost_of_row(layer, goes_back=goes_back) - sum(
        _cost_of_row(part, goes_back=goes_back) for part in parts
    )
    return before, rest


def _cost_of_row(module: nn.Module, *, goes_back: bool) -> float:
    """Operations for a row in all products of a module, with those of its gradients."""
    total = 0.0
    for own in module.modules():
        if not isinstance(own, Linear):
            continue
        size = own.in_features * own.out_features  # whatever is kept here of a sharded one
        total += 2.0 * size * (1 + goes_back + own.weight.requires_grad)
        if own.lora_a is not None:
            # Back to the input of A where to that of W, and always to that of B, for A's own gradient.
            learns = own.lora_a.requires_grad
            total += 2.0 * own.lora_rank * own.in_features * (1 + goes_back + learns)
            total += 2.0 * own.lora_rank * own.out_features * (1 + 2 * learns)
    return total


def _attention_flops(config: DecoderConfig, spans: Spans, window: int | None) -> float:
    """Two products, each a multiplication and an addition for every pair of a token and one that it sees."""
    num_seen = sum(_num_pairs(shared + own, window) - _num_pairs(shared, window) for shared, own in spans)
    return 4.0 * config.num_heads * config.head_dim * num_seen


def _num_pairs(length: int, window: int | None) -> int:
    """Tokens and those that they see, themselves included."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def _num_head(model: Decoder) -> int:
    return model.config.hidden_size * (model.config.vocab_size if model.head_kind == "lm" else 1)


def _learns_head(model: Decoder) -> bool:
    owned = model.config.owns_output_matrix(model.head_kind)
    return any(p.requires_grad for p in (model.head if owned else model.embedding).parameters())
