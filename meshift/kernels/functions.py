"""The C kernels with gradients, for the decoder's modules: what torch's autograd sees of them.

A weight with a `gradient_sum` (a function that gives its fp32 buffer; `training.optimizer` sets it) has its
gradient added there, unrounded, and autograd is told nothing; any other gets its gradient as always. Knows
nothing of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meshift.kernels.cpu import Kernels, Sequences

Gradients = tuple[Tensor | None, ...]


def rms_norm(kernels: Kernels, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight`, or times `1 + weight`, over the last dim."""
    found: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps, plus_one, kernels)
    return found


def linear(kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W' + b`; both dims of the weight are even."""
    found: Tensor = _Linear.apply(x.contiguous(), weight, bias, kernels)
    return found


def query_key_value(
    kernels: Kernels,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    turn: Turn,
    added: Sequence[Tensor | None] = (None, None, None),
) -> list[Tensor]:
    """The products of one input with three weights, as heads [T, heads, dim]; the first two turned by `turn`.

    What is `added` to each product [T, heads * dim] is so before the turn.
    """
    return list(_QueryKeyValue.apply(x.contiguous(), *weights, *biases, *added, turn, kernels))


def gated_mlp(
    kernels: Kernels, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str
) -> Tensor:
    """`down(activation(gate(x)) * up(x))` from the weights of gate, up and down."""
    given = [part for part in (x, *weights, *biases) if part is not None]
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in given)
    found: Tensor = _GatedMLP.apply(x.contiguous(), *weights, *biases, activation, keep, kernels)
    return found


def gated(kernels: Kernels, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up` of rows [T, n], rounded once."""
    found: Tensor = _Gated.apply(gate.contiguous(), up.contiguous(), activation, kernels)
    return found


def packed_attention(kernels: Kernels, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences) -> Tensor:
    """Causal attention within sequences, [T, heads, dim]."""
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    found: Tensor = _PackedAttention.apply(query, key, value, sequences, keep, kernels)
    return found


Sums = Callable[[], Tensor] | None
"""What gives the fp32 buffer of a parameter's gradient, where it has one."""


def sums_of(parameter: Tensor | None) -> Sums:
    """The parameter's `gradient_sum`. To be asked in the forward pass: what autograd hands back may be a copy."""
    found: Sums = getattr(parameter, "gradient_sum", None)
    return found


def add_to_weights(
    kernels: Kernels, weights: Sequence[Tensor], sums: Sequence[Sums], grad: Tensor, x: Tensor
) -> list[Tensor | None]:
    """The gradients of weights with one input from that of `x W'`; None each that went into its sums."""
    into = [torch.zeros(weight.shape) if own is None else own() for weight, own in zip(weights, sums, strict=True)]
    kernels.add_weight_gradients(grad, x, into)
    return [
        found.to(weight.dtype) if own is None else None
        for weight, own, found in zip(weights, sums, into, strict=True)
    ]


def add_to_vector(vector: Tensor, into: Sums, gradient: Tensor) -> Tensor | None:
    """As `add_to_weights`, for the fp32 gradient of a norm's weight or a bias."""
    if into is None:
        return gradient.to(vector.dtype)
    into().add_(gradient)
    return None


def _add_to_biases(
    biases: Sequence[Tensor | None], sums: Sequence[Sums], grads: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    return [
        add_to_vector(bias, own, grad.sum(0, dtype=torch.float32)) if bias is not None and wanted else None
        for bias, own, grad, wanted in zip(biases, sums, grads, needed, strict=True)
    ]


def _add_to_needed(
    kernels: Kernels, ctx: Any, first: int, grads: Tensor, x: Tensor, weights: Sequence[Tensor]
) -> list[Tensor | None]:
    """`add_to_weights` for those weights that need it; `first` is the number of the first one's argument."""
    numbers = range(len(weights))
    needed = [ctx.needs_input_grad[first + i] for i in numbers]
    sums = ctx.sums[first - 1 : first - 1 + len(weights)]
    if all(needed):
        return add_to_weights(kernels, weights, sums, grads, x)
    parts = grads.split([len(weight) for weight in weights], dim=1)
    return [
        add_to_weights(kernels, weights[i : i + 1], sums[i : i + 1], parts[i], x)[0] if needed[i] else None
        for i in numbers
    ]


class _RMSNorm(torch.autograd.Function):
    """See `rms_norm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool, kernels: Kernels) -> Tensor:
        inverses = torch.empty(x.numel() // x.shape[-1])
        ctx.save_for_backward(x, weight, inverses)
        ctx.plus_one, ctx.kernels, ctx.sums = plus_one, kernels, sums_of(weight)
        return kernels.rms_norm(x, weight, eps, plus_one=plus_one, inverses=inverses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, weight, inverses = ctx.saved_tensors
        to_x, to_weight = ctx.kernels.rms_norm_backward(
            x, grad.contiguous(), inverses, weight, plus_one=ctx.plus_one
        )
        found = add_to_vector(weight, ctx.sums, to_weight) if ctx.needs_input_grad[1] else None
        return to_x, found, None, None, None


class _Linear(torch.autograd.Function):
    """See `linear`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.kernels, ctx.sums = kernels, [sums_of(part) for part in (weight, bias)]
        return kernels.product(x, kernels.pack_here(weight), bias=bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, weight, bias = ctx.saved_tensors
        needed, kernels, grad = ctx.needs_input_grad, ctx.kernels, grad.contiguous()
        to_x = kernels.product(grad, kernels.pack_transposed(weight)) if needed[0] else None
        (to_weight,) = _add_to_needed(kernels, ctx, 1, grad, x, [weight])
        (to_bias,) = _add_to_biases([bias], ctx.sums[1:], [grad], needed[2:3])
        return to_x, to_weight, to_bias, None


class _QueryKeyValue(torch.autograd.Function):
    """See `query_key_value`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> tuple[Tensor, ...]:
        weights, biases, added, (turn, kernels) = given[:3], given[3:6], given[6:9], given[9:]
        ctx.save_for_backward(x, *weights, *biases)
        ctx.turn, ctx.kernels, ctx.sums = turn, kernels, [sums_of(part) for part in given[:6]]
        bias = None if biases[0] is None else torch.cat(biases)
        rows = kernels.product(x, kernels.pack_here(*weights), bias=bias)
        parts = rows.split([len(weight) for weight in weights], dim=1)
        for part, more in zip(parts, added, strict=True):
            if more is not None:
                part.add_(more)
        found = [part.unflatten(1, (-1, turn.head_dim)) for part in parts]
        turn.forward(kernels, found)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        x, *given = ctx.saved_tensors
        weights, biases, kernels = given[:3], given[3:], ctx.kernels
        needed = ctx.needs_input_grad
        whole = torch.cat([grad.flatten(1) for grad in grads], dim=1)
        parts = whole.split([len(weight) for weight in weights], dim=1)
        ctx.turn.backward(kernels, [part.unflatten(1, (-1, ctx.turn.head_dim)) for part in parts])
        to_x = kernels.product(whole, kernels.pack_transposed(*weights)) if needed[0] else None
        to_weights = _add_to_needed(kernels, ctx, 1, whole, x, weights)
        to_biases = _add_to_biases(biases, ctx.sums[3:], parts, needed[4:7])
        to_added = [
            part.contiguous() if wanted else None for part, wanted in zip(parts, needed[7:10], strict=True)
        ]
        return to_x, *to_weights, *to_biases, *to_added, None, None


class Turn:
    """Rotary of queries and keys, or none of it: a turn by the negative angles takes it back."""

    def __init__(self, head_dim: int, angles: tuple[Tensor, Tensor] | None) -> None:
        self.head_dim = head_dim
        self._angles = angles

    def forward(self, kernels: Kernels, heads: Sequence[Tensor]) -> None:
        """Turn queries and keys in place."""
        if self._angles is not None:
            for part in heads[:2]:
                kernels.turn(part, *self._angles)

    def backward(self, kernels: Kernels, heads: Sequence[Tensor]) -> None:
        """The same for gradients."""
        if self._angles is not None:
            cosine, sine = self._angles
            for part in heads[:2]:
                kernels.turn(part, cosine, -sine)


class _GatedMLP(torch.autograd.Function):
    """See `gated_mlp`. Keeps gate and up, and makes their product once more in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *given: Any) -> Tensor:
        weights, biases, (activation, keep, kernels) = given[:3], given[3:6], given[6:]
        gate, up = kernels.pack_here(weights[0], room="gate"), kernels.pack_here(weights[1], room="up")
        kept: Sequence[Tensor | None] = (None, None)
        if keep:
            kept = [x.new_empty(len(x), len(weights[0])) for _ in "gu"]
        wide = kernels.gated_product(x, gate, up, activation, biases[:2], kept)
        ctx.save_for_backward(x, *kept, *weights, *biases)
        ctx.activation, ctx.kernels, ctx.sums = activation, kernels, [sums_of(part) for part in given[:6]]
        return kernels.product(wide, kernels.pack_here(weights[2]), bias=biases[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        x, gate, up, *given = ctx.saved_tensors
        weights, biases, kernels = given[:3], given[3:], ctx.kernels
        needed, grad = ctx.needs_input_grad, grad.contiguous()
        to_wide = kernels.product(grad, kernels.pack_transposed(weights[2]))
        wide, both = kernels.gate_backward(gate, up, to_wide, ctx.activation)
        to_x = kernels.product(both, kernels.pack_transposed(*weights[:2])) if needed[0] else None
        to_weights = _add_to_needed(kernels, ctx, 1, both, x, weights[:2])
        to_weights += _add_to_needed(kernels, ctx, 3, grad, wide, weights[2:])
        halves = both.split(gate.shape[1], dim=1)
        to_biases = _add_to_biases(biases, ctx.sums[3:], [*halves, grad], needed[4:7])
        return to_x, *to_weights, *to_biases, None, None, None


class _Gated(torch.autograd.Function):
    """See `gated`. What the kernel gives lies in memory that is used again, hence the copies."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, kernels: Kernels) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.kernels = activation, kernels
        return kernels.gate_backward(gate, up, up, activation)[0].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        gate, up = ctx.saved_tensors
        _, both = ctx.kernels.gate_backward(gate, up, grad.contiguous(), ctx.activation)
        to_gate, to_up = both.split(gate.shape[1], dim=1)
        return to_gate.contiguous(), to_up.contiguous(), None, None


class _PackedAttention(torch.autograd.Function):
    """See `packed_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, keep: bool, kernels: Kernels
    ) -> Tensor:
        found = kernels.packed_attention((query, key, value), sequences, keep=keep)
        ctx.save_for_backward(query, key, value, *found)
        ctx.sequences, ctx.kernels = sequences, kernels
        return found[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        *heads, out, lse = ctx.saved_tensors
        found = ctx.kernels.packed_attention_backward(heads, ctx.sequences, out, lse, grad.contiguous())
        return *found, None, None, None
