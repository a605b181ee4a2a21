"""The floating-point operations of training, counted from shapes: what model FLOP utilisation divides by the peak.

Products of matrices and of attention, a multiplication and an addition each. Norms, rotary and the optimizer are
left out, and so is what `gradient_checkpointing` computes twice: more work is not more use. It knows nothing of
how fast a device is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshift.layout.shard import Shard
from meshift.models.config import DecoderConfig
from meshift.models.decoder import Decoder, Layer
from meshift.models.linear import Linear
from meshift.models.shards import shard_table


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

    Of a model that was cut into stages, in the layers that are here; a gradient is taken to go to the layers
    before them. Of one that was cut within its layers, what all its parts do together.

    A product costs its forward, as much again for its inputs' gradient, and once more for its weights' gradient.
    Frozen layers that nothing trained lies under have no backward pass; a frozen head, and a frozen matrix beside
    an adapter, has one to its inputs only.
    """
    num_rows, total = sum(own for _, own in spans), 0.0
    table = shard_table(model.config, model.head_kind)
    learned_below = any(p.requires_grad for p in model.embedding.parameters()) or not model.embeds
    for layer in model.layers:
        assert isinstance(layer, Layer)
        index = layer.attention.layer.index
        learned = any(p.requires_grad for p in layer.parameters())
        before, after = _costs_of_row(layer, model.config, table, learned=learned, learned_below=learned_below)
        last = index == model.config.num_layers - 1  # of which leaves: products after attention see no other row
        total += num_rows * before + (num_last if last else num_rows) * after
        attention = _attention_flops(model.config, spans, model.config.window(index))
        total += attention * (3 if learned or learned_below else 1)
        learned_below = learned_below or learned
    return total + 2.0 * num_read * _num_head(model) * (2 + _learns_head(model)) * model.ends


BEFORE_ATTENTION = ("attention.query", "attention.key", "attention.value")


def _costs_of_row(
    layer: Layer, config: DecoderConfig, table: Mapping[str, Shard], *, learned: bool, learned_below: bool
) -> tuple[float, float]:
    """Operations for a row in a layer's products before attention, and in those after; of all its parts."""
    own, norm = layer.attention, layer.attention_norm
    first = learned_below or (norm is not None and any(p.requires_grad for p in norm.parameters()))
    # Under the lowest adapters nothing is learned, so that what enters needs no gradient.
    first = first or (learned and own.query.weight.requires_grad)
    before = after = 0.0
    for name in config.linear_names:
        linear = layer.get_submodule(name)
        assert isinstance(linear, Linear)
        num_out, num_in = table[f"layers.{own.layer.index}.{name}.weight"].shape
        if name in BEFORE_ATTENTION:
            before += _cost_of_row(linear, num_in, num_out, goes_back=first)
        else:
            after += _cost_of_row(linear, num_in, num_out, goes_back=learned or learned_below)
    return before, after


def _cost_of_row(linear: Linear, num_in: int, num_out: int, *, goes_back: bool) -> float:
    """Operations for a row in a product from `num_in` to `num_out`, with those of its gradients."""
    total = 2.0 * num_in * num_out * (1 + goes_back + linear.weight.requires_grad)
    if linear.lora_a is None:
        return total
    # Back to the input of A where to that of W, and always to that of B, for A's own gradient.
    learns = linear.lora_a.requires_grad
    total += 2.0 * linear.lora_rank * num_in * (1 + goes_back + learns)
    return total + 2.0 * linear.lora_rank * num_out * (1 + 2 * learns)


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
    parameters = model.head.parameters(recurse=False) if owned else model.embedding.parameters()
    return any(p.requires_grad for p in parameters)
