"""The C kernels as functions of tensors: bfloat16 on a CPU. Knows nothing of models.

`kernels()` gives them, or None where torch's own have to do. What each computes stands in the C files beside this
one. Every call is deterministic: a row gets the same bits whatever else is in the call, however many threads run.
"""

import ctypes
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from meshift.kernels.build import Built, build, cpu_flags

ACTIVATIONS = {
    "none": 0,
    "silu": 1,
    "swish": 1,
    "relu": 3,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
}
"""What products can apply, by the names of Hugging Face configs."""
LANES = 16
MAX_HEAD_DIM = 256
MAX_GROUP = 16
"""Query heads of a key head that decode attention serves."""

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[str, type | None]] = {
    "packed_size": ("ll", _LONG),
    "gradient_scratch": ("lll", _LONG),
    "pack": ("pllpi", None),
    "pack_columns": ("plllpi", None),
    "product": ("pllplpippii", None),
    "gated_product": ("pllpplppipi", None),
    "gradient": ("plpllppi", None),
    "rms_norm": ("pllpfipi", None),
    "turn": ("plllllppi", None),
    "put": ("pllllppi", None),
    "attend": ("plllllpplplfpi", None),
    "draw": ("pllfpplppppi", _LONG),
}
"""Arguments of each kernel: p a pointer, l a long, i an int, f a float."""
_TYPES = {"p": _POINTER, "l": _LONG, "i": _INT, "f": _FLOAT}


@cache
def built() -> Built:
    """The library of this process, or why there is none."""
    found = build()
    if found.library is not None:
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(found.library, name)
            function.argtypes, function.restype = [_TYPES[kind] for kind in arguments], result
    return found


@cache
def kernels() -> "Kernels | None":
    """The kernels, where this machine has them."""
    library = built().library
    return None if library is None else Kernels(library)


def kernels_for(tensor: Tensor) -> "Kernels | None":
    """The kernels, where they serve tensors like this one."""
    return kernels() if tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" else None


def products_for(weight: Tensor) -> "Kernels | None":
    """As `kernels_for`, for matrix products: processors with AMX multiply faster by torch's."""
    return None if "amx_bf16" in cpu_flags() else kernels_for(weight)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A matrix [num_columns, num_inputs] as products read it."""

    values: Tensor
    num_columns: int
    num_inputs: int


class Kernels:
    """See the module. Tensors are bfloat16 and contiguous unless a method says otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._kept = threading.local()  # scratch memory, one for each thread that calls

    def pack(self, weight: Tensor) -> Packed:
        """A weight [out, in] with an even number of inputs."""
        columns, inputs = weight.shape
        assert weight.is_contiguous()
        assert inputs % 2 == 0
        packed = self._room(columns, inputs)
        self._library.pack(weight.data_ptr(), columns, inputs, packed.data_ptr(), _threads())
        return Packed(values=packed, num_columns=columns, num_inputs=inputs)

    def _room(self, columns: int, inputs: int) -> Tensor:
        return torch.empty(self._library.packed_size(columns, inputs), dtype=torch.bfloat16)

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
        num_rows = len(rows)
        assert rows.is_contiguous()
        assert rows.shape[1] == weight.num_inputs
        assert other is None or (other.is_contiguous() and other.shape == (num_rows, weight.num_columns))
        found = rows.new_empty(num_rows, weight.num_columns) if out is None else out
        self._library.product(
            *(rows.data_ptr(), num_rows, weight.num_inputs, weight.values.data_ptr(), weight.num_columns),
            *(_address(bias), ACTIVATIONS[activation], _address(other)),
            *(found.data_ptr(), int(found.dtype == torch.float32), _threads()),
        )
        return found

    def gated_product(
        self,
        rows: Tensor,
        gate: Packed,
        up: Packed,
        activation: str,
        biases: Sequence[Tensor | None] = (None, None),
    ) -> Tensor:
        """`activation(rows G' + b) * (rows U' + c)`."""
        assert rows.is_contiguous()
        assert rows.shape[1] == gate.num_inputs
        found = rows.new_empty(len(rows), gate.num_columns)
        self._library.gated_product(
            *(rows.data_ptr(), len(rows), gate.num_inputs, gate.values.data_ptr(), up.values.data_ptr()),
            *(gate.num_columns, _address(biases[0]), _address(biases[1]), ACTIVATIONS[activation]),
            *(found.data_ptr(), _threads()),
        )
        return found

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight`, or times `1 + weight`, over the last dim."""
        assert x.is_contiguous()
        found = torch.empty_like(x)
        size = x.shape[-1]
        self._library.rms_norm(
            *(x.data_ptr(), x.numel() // size, size, weight.data_ptr(), eps, int(plus_one)),
            *(found.data_ptr(), _threads()),
        )
        return found

    def turn(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> None:
        """Rotary in place: `heads` [T, heads, dim], dense but for the rows' stride; angles [T, 1, turned / 2]."""
        num_rows, num_heads, dim = heads.shape
        half = cosine.shape[-1]
        assert half % LANES == 0
        assert _dense(heads)
        self._library.turn(
            *(heads.data_ptr(), num_rows, heads.stride(0), num_heads, dim, half),
            *(cosine.data_ptr(), sine.data_ptr(), _threads()),
        )

    def put(self, heads: Tensor, places: Tensor, target: Tensor) -> None:
        """Copy [T, heads, dim] to `places` [T, heads] (int64, counted in heads) of `target`."""
        num_rows, num_heads, dim = heads.shape
        assert _dense(heads)
        assert places.is_contiguous()
        assert target.is_contiguous()
        self._library.put(
            *(heads.data_ptr(), num_rows, heads.stride(0), num_heads, dim, places.data_ptr()),
            *(target.data_ptr(), _threads()),
        )

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, window: int, scale: float
    ) -> Tensor:
        """One query row for each slot: `query` [T, heads, dim], `keys`, `values` [slots, kv_heads, reach, dim].

        Row r sees the last `window` (0: all) positions up to `positions[r]` of slot r.
        """
        num_rows, num_heads, dim = query.shape
        kv_heads, reach = keys.shape[1:3]
        assert _dense(query)
        assert keys.is_contiguous()
        assert values.is_contiguous()
        found = query.new_empty(num_rows, num_heads, dim)
        self._library.attend(
            *(query.data_ptr(), num_rows, query.stride(0), kv_heads, num_heads // kv_heads, dim),
            *(keys.data_ptr(), values.data_ptr(), reach, positions.data_ptr(), window, scale),
            *(found.data_ptr(), _threads()),
        )
        return found

    def draw(
        self, logits: Tensor, numbers: Tensor, *, temperature: float, short: Tensor, forbidden: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Tokens (int64) and log-probs drawn from fp32 `logits` [N, vocab] by `numbers` [N] (fp64, in [0, 1)).

        Where `short` [N] (uint8) is set, `forbidden` ids (int64) cannot be drawn. The last result is the first row
        whose logits are not all finite, or -1.
        """
        num_rows, vocab = logits.shape
        assert logits.is_contiguous()
        assert logits.dtype == torch.float32
        tokens = torch.empty(num_rows, dtype=torch.int64)
        logprobs = torch.empty(num_rows)
        sums = torch.empty(num_rows * math.ceil(vocab / 256), dtype=torch.float64)
        faulty = self._library.draw(
            *(logits.data_ptr(), num_rows, vocab, temperature, short.data_ptr()),
            *(forbidden.data_ptr(), len(forbidden), numbers.data_ptr(), sums.data_ptr()),
            *(tokens.data_ptr(), logprobs.data_ptr(), _threads()),
        )
        return tokens, logprobs, int(faulty)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dense(heads: Tensor) -> bool:
    """Whether the heads of a row lie without gaps."""
    return heads.stride(2) == 1 and (heads.shape[1] == 1 or heads.stride(1) == heads.shape[2])


def _threads() -> int:
    return torch.get_num_threads()
