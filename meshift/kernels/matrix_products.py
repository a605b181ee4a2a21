"""Matrix products of the C kernels as functions of tensors, and the memory that kernels use again.

Tensors are bfloat16 on a CPU, and contiguous unless a method says otherwise. Knows nothing of models.
"""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATIONS = {
    "none": 0,
    "silu": 1,
    "swish": 1,
    "relu": 3,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
}
"""What products can apply, by the names of Hugging Face configs."""
GROUP = 48
"""Columns that packed weights are laid out by (`products.c`)."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A matrix [num_columns, num_inputs] as products read it."""

    values: Tensor
    num_columns: int
    num_inputs: int


class ProductKernels:
    """Packs and multiplies. Memory that is not kept is one for each thread that calls."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._kept = threading.local()

    def scratch(self, room: str, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Memory that is used again by whoever asks for the same `room`; fresh pages are slow on a CPU."""
        kept = self.take(room, size, dtype)
        self.give_back(room, kept)
        return kept[:size]

    def take(self, room: str, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """As `scratch`, but nobody else gets it until it is given back; it may be larger than asked for."""
        kept: Tensor | None = self._kept.__dict__.pop(room, None)
        if kept is not None and kept.numel() >= size and kept.dtype == dtype:
            return kept
        del kept  # before the new one exists
        with torch.inference_mode(False):  # what is made in inference mode cannot be written to outside of it
            return torch.empty(size, dtype=dtype)

    def give_back(self, room: str, memory: Tensor) -> None:
        """What `take` gave, for the next who asks."""
        self._kept.__dict__[room] = memory

    def release(self) -> None:
        """Free the memory that this thread would have used again."""
        self._kept.__dict__.clear()

    def pack(self, weight: Tensor) -> Packed:
        """A weight [out, in] with an even number of inputs, to be kept."""
        columns, inputs = weight.shape
        values = torch.empty(self._library.packed_size(columns, inputs), dtype=torch.bfloat16)
        return self._pack((weight,), values)

    def pack_here(self, *weights: Tensor, room: str = "") -> Packed:
        """Weights [out, in] one below another, in memory that the next ones for the same `room` will use."""
        if any(len(weight) % GROUP for weight in weights[:-1]):
            weights = (torch.cat(weights),)
        columns, inputs = sum(map(len, weights)), weights[0].shape[1]
        return self._pack(weights, self.scratch(f"packed {room}", self._library.packed_size(columns, inputs)))

    def _pack(self, weights: Sequence[Tensor], values: Tensor) -> Packed:
        inputs, start = weights[0].shape[1], 0
        _check(*weights, even=inputs)
        for weight in weights:
            place = values.data_ptr() + start * inputs * values.element_size()
            self._library.pack(weight.data_ptr(), len(weight), inputs, place, threads())
            start += len(weight)
        return Packed(values=values, num_columns=start, num_inputs=inputs)

    def pack_transposed(self, *weights: Tensor, room: str = "") -> Packed:
        """The transposed of weights [out, in] one below another, each with an even `out`: see `pack_here`."""
        columns, inputs = weights[0].shape[1], sum(map(len, weights))
        values = self.scratch(f"packed {room}", self._library.packed_size(columns, inputs))
        first = 0
        for weight in weights:
            _check(weight, even=len(weight))
            self._library.pack_columns(
                *(weight.data_ptr(), columns, len(weight), first, inputs // 2, values.data_ptr(), threads())
            )
            first += len(weight) // 2
        return Packed(values=values, num_columns=columns, num_inputs=inputs)

    def product(
        self,
        rows: Tensor,
        weight: Packed,
        *,
        bias: Tensor | None = None,
        activation: str = "none",
        other: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """`activation(rows W' + bias) + other`: [T, in] -> [T, out], into `out` (fp32 or bfloat16) where given."""
        num_rows, rows = len(rows), rows.contiguous()
        assert rows.shape[1] == weight.num_inputs
        assert other is None or (other.is_contiguous() and other.shape == (num_rows, weight.num_columns))
        found = rows.new_empty(num_rows, weight.num_columns) if out is None else out
        assert found.is_contiguous()
        assert found.shape == (num_rows, weight.num_columns)
        assert bias is None or bias.dtype == torch.bfloat16
        self._library.product(
            *(rows.data_ptr(), num_rows, weight.num_inputs, weight.values.data_ptr(), weight.num_columns),
            *(address(bias), ACTIVATIONS[activation], address(other)),
            *(found.data_ptr(), int(found.dtype == torch.float32), threads()),
        )
        return found

    def gated_product(
        self,
        rows: Tensor,
        gate: Packed,
        up: Packed,
        activation: str,
        biases: Sequence[Tensor | None] = (None, None),
        kept: Sequence[Tensor | None] = (None, None),
    ) -> Tensor:
        """`activation(rows G' + b) * (rows U' + c)`; the two products go into `kept` where that is given."""
        rows = rows.contiguous()
        assert rows.shape[1] == gate.num_inputs
        found = rows.new_empty(len(rows), gate.num_columns)
        self._library.gated_product(
            *(rows.data_ptr(), len(rows), gate.num_inputs, gate.values.data_ptr(), up.values.data_ptr()),
            *(gate.num_columns, address(biases[0]), address(biases[1]), ACTIVATIONS[activation]),
            *(found.data_ptr(), address(kept[0]), address(kept[1]), threads()),
        )
        return found

    def add_weight_gradients(self, grad: Tensor, rows: Tensor, sums: Sequence[Tensor]) -> None:
        """`sums += grad' rows` in fp32: [T, out], [T, in] -> [out, in]. Rows of `grad` may lie apart.

        With several sums, which are [part of out, in] each, the columns of `grad` are theirs one after another.
        """
        num_rows, num_out = grad.shape
        num_in = rows.shape[1]
        assert grad.stride(1) == 1
        assert len(rows) == num_rows
        assert sum(map(len, sums)) == num_out
        _check(rows)
        for part in sums:
            assert part.is_contiguous()
            assert part.dtype == torch.float32
            assert part.shape[1] == num_in
        ends = torch.tensor([len(part) for part in sums]).cumsum(0)
        addresses = torch.tensor([part.data_ptr() for part in sums])
        scratch = self.scratch("gradient", self._library.gradient_scratch(num_rows, num_out, num_in))
        self._library.gradient(
            *(grad.data_ptr(), num_out, grad.stride(0), rows.data_ptr(), num_in, num_rows),
            *(scratch.data_ptr(), addresses.data_ptr(), ends.data_ptr(), threads()),
        )


def _check(*tensors: Tensor, even: int = 0) -> None:
    """What the kernels cannot check themselves."""
    for tensor in tensors:
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous()
    assert even % 2 == 0


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor lies; None where there is none."""
    return None if tensor is None else tensor.data_ptr()


def threads() -> int:
    """As many as torch uses."""
    return torch.get_num_threads()
