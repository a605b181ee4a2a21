"""The decoder's matrices as generation multiplies by them: neighbours fused, in the layout the kernels read.

A CPU's matrix kernels want weights in blocks and would rearrange plain ones at every call, which costs more than
the product itself where there are few rows. Knows nothing of layers, caches or sampling.
"""

import platform
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meshift.kernels.cpu import ACTIVATIONS as KERNEL_ACTIVATIONS
from meshift.kernels.cpu import Kernels, products_for
from meshift.models.linear import Linear, SummedLinear
from meshift.models.mlp import ACTIVATIONS

PACKED_ROWS = 64
"""The number of rows that packed weights are laid out for; they serve any other as well."""
PACKED_TYPES = (torch.float32, torch.bfloat16)
_FUSED_ACTIVATIONS = (("silu", "swish"), ("swish", "swish"), ("relu", "relu"))
"""Activations that the kernel applies before it rounds: our name, its name."""

Fingerprint = tuple[tuple[int, int, int], ...]


class Matrix(Protocol):
    """Rows [T, in] times one matrix, or several that share their input and lie beside each other: [T, out]."""

    num_bytes: int
    """Memory beside the model's own parameters."""

    def __call__(self, rows: Tensor, activation: str | None = None) -> Tensor:
        """`activation(rows W' + b)`, a tensor of its own."""
        ...

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """`rows W' + b + other`."""
        ...

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """`(rows W' + b) * other`."""
        ...


class PlainMatrix:
    """Reads the model's own parameters at every call: no copy, and nothing that could be stale."""

    num_bytes = 0

    def __init__(self, parts: Sequence[Linear]) -> None:
        self._parts = parts

    def __call__(self, rows: Tensor, activation: str | None = None) -> Tensor:
        """See `Matrix`."""
        products = [part(rows) for part in self._parts]
        product = torch.cat(products, dim=-1) if len(products) > 1 else products[0]
        return product if activation is None else ACTIVATIONS[activation](product)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self(rows) + other

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self(rows) * other


class CopiedMatrix:
    """A copy of the weights as they are: for those that are sums of a matrix and its adapter."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (None,)) -> None:
        self._weight = _beside(weights)
        self._bias = None if biases[0] is None else _beside([bias for bias in biases if bias is not None])
        self.num_bytes = self._weight.nbytes

    def __call__(self, rows: Tensor, activation: str | None = None) -> Tensor:
        """See `Matrix`."""
        product = F.linear(rows, self._weight, self._bias)
        return product if activation is None else ACTIVATIONS[activation](product)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self(rows) + other

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self(rows) * other


class PackedMatrix:
    """A copy of the weights in oneDNN's blocks. The result of a row does not depend on the number of rows (tested;
    in fp32 from 8 rows on), and what is added or multiplied is so before rounding.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (None,)) -> None:
        weight = _beside(weights)
        self._bias = None if biases[0] is None else _beside([bias for bias in biases if bias is not None]).clone()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
        self.num_bytes = weight.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, rows: Tensor, activation: str | None = None) -> Tensor:
        """See `Matrix`."""
        fused = dict(_FUSED_ACTIVATIONS).get(str(activation), "none")
        product = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self._bias, fused, [], "")
        return product if activation is None or fused != "none" else ACTIVATIONS[activation](product)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return torch.ops.mkldnn._linear_pointwise.binary(rows, other, self._weight, self._bias, "add")

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return torch.ops.mkldnn._linear_pointwise.binary(rows, other, self._weight, self._bias, "mul")


class KernelMatrix:
    """A copy of the weights as Meshift's own kernels read them (`kernels/products.c`): bfloat16 on a CPU.

    A row's bits do not depend on the number of rows. Activations and sums are taken before rounding.
    """

    def __init__(
        self, kernels: Kernels, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (None,)
    ) -> None:
        self._kernels = kernels
        self.bias = None if biases[0] is None else _beside([bias for bias in biases if bias is not None]).clone()
        self.weight = kernels.pack(_beside(weights))
        self.num_bytes = self.weight.values.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, rows: Tensor, activation: str | None = None) -> Tensor:
        """See `Matrix`."""
        fused = activation if activation in KERNEL_ACTIVATIONS else "none"
        product = self._kernels.product(rows, self.weight, bias=self.bias, activation=fused)
        return product if activation in (None, fused) else ACTIVATIONS[activation](product)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self._kernels.product(rows, self.weight, bias=self.bias, other=other)

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self(rows) * other

    def gated(self, rows: Tensor, gate: "KernelMatrix", activation: str) -> Tensor:
        """`activation(rows G' + b) * (rows W' + c)`, rounded once."""
        biases = (gate.bias, self.bias)
        return self._kernels.gated_product(rows, gate.weight, self.weight, activation, biases)

    def wide(self, rows: Tensor, out: Tensor) -> Tensor:
        """`rows W' + b` in fp32, not rounded, into `out`."""
        return self._kernels.product(rows, self.weight, bias=self.bias, out=out)


class SummedMatrix:
    """Some columns of a matrix: the sum of what all parts give, and the bias added once."""

    def __init__(self, part: SummedLinear) -> None:
        assert part.total is not None
        self._bias, self._total = part.bias, part.total
        weight = part.merged()
        self._part = pack([weight]) if can_pack(weight) else _BareMatrix(weight)
        self.num_bytes = self._part.num_bytes

    def __call__(self, rows: Tensor, activation: str | None = None) -> Tensor:
        """See `Matrix`."""
        product = self._total(self._part(rows))
        product = product if self._bias is None else product + self._bias
        return product if activation is None else ACTIVATIONS[activation](product)

    def plus(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self(rows) + other

    def times(self, rows: Tensor, other: Tensor) -> Tensor:
        """See `Matrix`."""
        return self(rows) * other


class _BareMatrix:
    """`rows W'`."""

    num_bytes = 0

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def __call__(self, rows: Tensor) -> Tensor:
        return F.linear(rows, self._weight)


def _beside(parts: Sequence[Tensor]) -> Tensor:
    whole = torch.cat([part.detach() for part in parts]) if len(parts) > 1 else parts[0].detach()
    return whole.contiguous()


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (None,)) -> PackedMatrix | KernelMatrix:
    """A packed copy by whichever kernels are the faster; `can_pack` says whether there are any."""
    kernels = products_for(weights[0])
    if kernels is not None and weights[0].shape[1] % 2 == 0:
        return KernelMatrix(kernels, weights, biases)
    return PackedMatrix(weights, biases)


def can_pack(weight: Tensor) -> bool:
    """Whether there are, on this machine, packed kernels for a matrix like this one."""
    if weight.device.type != "cpu" or weight.dtype not in PACKED_TYPES:
        return False
    if products_for(weight) is not None:
        return True
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    known = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    return known and (weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_matrix(parts: Sequence[Linear]) -> Matrix:
    """The matrices of `parts` beside each other: packed where they can be, adapters merged into copies of them."""
    first = parts[0]
    if isinstance(first, SummedLinear) and first.total is not None:
        return SummedMatrix(first)
    biases = [part.bias for part in parts]
    if can_pack(first.weight):
        return pack([part.merged() for part in parts], biases)
    if any(part.is_adapted for part in parts):
        return CopiedMatrix([part.merged() for part in parts], biases)
    return PlainMatrix(parts)


def fingerprint(model: nn.Module) -> Fingerprint:
    """Differs whenever some parameter does: where each lies, how often it was changed, and the sum of its bits.

    The bits are read since writes through `.data` are not counted; that takes as long as reading the weights once.
    """
    return tuple(
        (parameter.data_ptr(), 0 if parameter.is_inference() else parameter._version, _sum_of_bits(parameter))
        for parameter in model.parameters()
    )


def _sum_of_bits(parameter: Tensor) -> int:
    """The sum modulo 2**64 of a tensor's words, as wide as its size allows."""
    flat = parameter.detach().contiguous().view(-1)
    for words in (torch.int64, torch.int32, torch.int16):
        if flat.nbytes % words.itemsize == 0 and flat.data_ptr() % words.itemsize == 0:
            return int(flat.view(words).sum())
    return int(flat.view(torch.uint8).sum())
