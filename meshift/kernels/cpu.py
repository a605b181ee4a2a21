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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[str, type | None]] = {
    "packed_size": ("ll", _LONG),
    "gradient_scratch": ("lll", _LONG),
    "pack": ("pllpi", None),
    "pack_columns": ("plllpi", None),
    "product": ("pllplpippii", None),
    "gated_product": ("pllpplppipppi", None),
    "gradient": ("pllpllppi", None),
    "rms_norm": ("pllpfippi", None),
    "rms_norm_backward": ("pppllpipppi", None),
    "gate_backward": ("pppllippi", None),
    "turn": ("plllllppi", None),
    "put": ("pllllppi", None),
    "decode_room": ("p", _LONG),
    "decode": ("pplppp", None),
    "attend": ("plllllpplplfpi", None),
    "packed_attention": ("ppppppfppi", None),
    "packed_attention_backward": ("ppppppfppppppi", None),
    "draw": ("pllfpplppppi", _LONG),
    "logprobs": ("pllfpppppi", None),
    "logprob_gradients": ("pllfppppi", None),
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
    if library is None:
        return None
    keep_freed_pages()
    return Kernels(library)


def keep_freed_pages() -> None:
    """Let this process keep memory that was freed: the next activations lie there, and not in fresh pages.

    To touch 12 MB of fresh pages takes as long as a fifth of the matrix product that fills them. Pieces above
    glibc's limit of 32 MB still come and go. Other C libraries have no such switch.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


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


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What packed attention has to know beside its rows: `starts` int64 [sequences + 1], `window` 0 for none."""

    starts: Tensor
    scale: float
    window: int = 0


class Kernels:
    """See the module. Tensors are bfloat16 and contiguous unless a method says otherwise."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._kept = threading.local()  # scratch memory, one for each thread that calls

    def pack(self, weight: Tensor, *, kept: bool = True, room: str = "") -> Packed:
        """A weight [out, in] with an even number of inputs.

        Unless it is `kept`, it lies in memory that the next one for the same `room` will use.
        """
        columns, inputs = weight.shape
        assert weight.is_contiguous()
        assert inputs % 2 == 0
        packed = self._packed(columns, inputs, kept, room)
        self._library.pack(weight.data_ptr(), columns, inputs, packed.values.data_ptr(), _threads())
        return packed

    def pack_transposed(self, weight: Tensor, room: str = "") -> Packed:
        """The transposed of a weight [out, in] with an even number of outputs, not kept: see `pack`."""
        inputs, columns = weight.shape
        assert weight.is_contiguous()
        assert inputs % 2 == 0
        packed = self._packed(columns, inputs, False, room)
        self._library.pack_columns(
            weight.data_ptr(), columns, inputs, columns, packed.values.data_ptr(), _threads()
        )
        return packed

    def _packed(self, columns: int, inputs: int, kept: bool, room: str) -> Packed:
        size = self._library.packed_size(columns, inputs)
        values = torch.empty(size, dtype=torch.bfloat16) if kept else self.scratch(f"packed {room}", size)
        return Packed(values=values, num_columns=columns, num_inputs=inputs)

    def scratch(self, room: str, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Memory that is used again by whoever asks for the same `room`; fresh pages are slow on a CPU."""
        kept = self.take(room, size, dtype)
        self.give_back(room, kept)
        return kept[:size]

    def take(self, room: str, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """As `scratch`, but nobody else gets it until it is given back; it may be larger than asked for."""
        kept: Tensor | None = self._kept.__dict__.pop(room, None)
        return kept if kept is not None and kept.numel() >= size else torch.empty(size, dtype=dtype)

    def give_back(self, room: str, memory: Tensor) -> None:
        """What `take` gave, for the next who asks."""
        self._kept.__dict__[room] = memory

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
        kept: Sequence[Tensor | None] = (None, None),
    ) -> Tensor:
        """`activation(rows G' + b) * (rows U' + c)`; the two products go into `kept` where that is given."""
        rows = rows.contiguous()
        assert rows.shape[1] == gate.num_inputs
        found = rows.new_empty(len(rows), gate.num_columns)
        self._library.gated_product(
            *(rows.data_ptr(), len(rows), gate.num_inputs, gate.values.data_ptr(), up.values.data_ptr()),
            *(gate.num_columns, _address(biases[0]), _address(biases[1]), ACTIVATIONS[activation]),
            *(found.data_ptr(), _address(kept[0]), _address(kept[1]), _threads()),
        )
        return found

    def rms_norm(
        self, x: Tensor, weight: Tensor, eps: float, *, plus_one: bool = False, inverses: Tensor | None = None
    ) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight`, or times `1 + weight`, over the last dim.

        `inverses` (fp32, one a row) gets `1 / sqrt(...)` where it is given.
        """
        assert x.is_contiguous()
        found = torch.empty_like(x)
        size = x.shape[-1]
        self._library.rms_norm(
            *(x.data_ptr(), x.numel() // size, size, weight.data_ptr(), eps, int(plus_one)),
            *(found.data_ptr(), _address(inverses), _threads()),
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

    def decode(self, x: Tensor, layers: ctypes.Array, shape: ctypes.Structure, step: ctypes.Structure) -> None:
        """All layers of a decode step, in place on `x` [rows, hidden]: see `generation.whole_step`."""
        assert x.is_contiguous()
        setattr(step, "threads", _threads())  # noqa: B010
        room = self.scratch("decode", len(x) * self._library.decode_room(ctypes.addressof(shape)))
        self._library.decode(
            *(x.data_ptr(), ctypes.addressof(layers), len(layers), ctypes.addressof(shape)),
            *(ctypes.addressof(step), room.data_ptr()),
        )

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

    def add_weight_gradient(self, grad: Tensor, rows: Tensor, sums: Tensor) -> None:
        """`sums += grad' rows` in fp32: [T, out], [T, in] -> [out, in]. Rows of `grad` may lie apart."""
        num_rows, num_out = grad.shape
        num_in = rows.shape[1]
        assert grad.stride(1) == 1
        assert rows.is_contiguous()
        assert sums.is_contiguous()
        scratch = self.scratch("gradient", self._library.gradient_scratch(num_rows, num_out, num_in))
        self._library.gradient(
            *(grad.data_ptr(), num_out, grad.stride(0), rows.data_ptr(), num_in, num_rows),
            *(scratch.data_ptr(), sums.data_ptr(), _threads()),
        )

    def rms_norm_backward(
        self, x: Tensor, grad: Tensor, inverses: Tensor, weight: Tensor, *, plus_one: bool
    ) -> tuple[Tensor, Tensor]:
        """The gradients of `x`, and of the weight in fp32."""
        size = x.shape[-1]
        num_rows = x.numel() // size
        to_x, to_weight = torch.empty_like(x), torch.empty(size)
        shares = self.scratch("norm", math.ceil(num_rows / 64) * size, torch.float32)
        self._library.rms_norm_backward(
            *(x.data_ptr(), grad.data_ptr(), inverses.data_ptr(), num_rows, size, weight.data_ptr()),
            *(int(plus_one), to_x.data_ptr(), shares.data_ptr(), to_weight.data_ptr(), _threads()),
        )
        return to_x, to_weight

    def gate_backward(self, gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """`activation(gate) * up` again, and the gradients of gate and up beside each other, [T, 2 n]."""
        num_rows, size = gate.shape
        product = self.scratch("gated", num_rows * size).view(num_rows, size)
        both = self.scratch("gate and up", num_rows * size * 2).view(num_rows, 2 * size)
        self._library.gate_backward(
            *(gate.data_ptr(), up.data_ptr(), grad.data_ptr(), num_rows, size, ACTIVATIONS[activation]),
            *(product.data_ptr(), both.data_ptr(), _threads()),
        )
        return product, both

    def packed_attention(self, heads: Sequence[Tensor], sequences: Sequences, *, keep: bool) -> tuple[Tensor, ...]:
        """Causal attention of query, key and value [T, heads, dim] within each sequence: [T, heads, dim].

        Beside it, where they are to be kept for the backward pass, the logarithms of the softmax's sums, fp32
        [T, heads].
        """
        num_rows, num_heads, dim = heads[0].shape
        out = heads[0].new_empty(num_rows, num_heads, dim)
        lse = torch.empty(num_rows, num_heads) if keep else None
        strides, sizes = _attention_sizes(heads, sequences)
        self._library.packed_attention(
            *(part.data_ptr() for part in heads),
            *(strides.data_ptr(), sequences.starts.data_ptr(), sizes.data_ptr(), sequences.scale),
            *(out.data_ptr(), _address(lse), _threads()),
        )
        return (out,) if lse is None else (out, lse)

    def packed_attention_backward(
        self, heads: Sequence[Tensor], sequences: Sequences, out: Tensor, lse: Tensor, grad: Tensor
    ) -> list[Tensor]:
        """The gradients of query, key and value; `grad` is contiguous."""
        found = [torch.empty(part.shape, dtype=part.dtype) for part in heads]
        strides, sizes = _attention_sizes([*heads, *found], sequences)
        self._library.packed_attention_backward(
            *(part.data_ptr() for part in heads),
            *(strides.data_ptr(), sequences.starts.data_ptr(), sizes.data_ptr(), sequences.scale),
            *(out.data_ptr(), lse.data_ptr(), grad.data_ptr()),
            *(part.data_ptr() for part in found),
            _threads(),
        )
        return found

    def logprobs(
        self, logits: Tensor, targets: Tensor, *, temperature: float, entropy: bool, likeliest: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Of fp32 logits [N, vocab]: normalisers, the targets' log-probs, entropies, whether they are likeliest.

        All of logits / temperature, in nats, fp32 [N].
        """
        num_rows, vocab = logits.shape
        normalisers, found = torch.empty(num_rows), torch.empty(num_rows)
        entropies = torch.empty(num_rows) if entropy else None
        correct = torch.empty(num_rows) if likeliest else None
        self._library.logprobs(
            *(logits.data_ptr(), num_rows, vocab, temperature, targets.data_ptr(), normalisers.data_ptr()),
            *(found.data_ptr(), _address(entropies), _address(correct), _threads()),
        )
        return normalisers, found, entropies, correct

    def logprob_gradients(
        self,
        logits: Tensor,
        targets: Tensor,
        normalisers: Tensor,
        scales: Tensor,
        temperature: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient of scale x log-prob in the logits, bfloat16 [N, vocab].

        Unless `out` is given it lies in memory that is used again.
        """
        num_rows, vocab = logits.shape
        found = self.scratch("logit gradients", num_rows * vocab).view(logits.shape) if out is None else out
        self._library.logprob_gradients(
            *(logits.data_ptr(), num_rows, vocab, temperature, targets.data_ptr(), normalisers.data_ptr()),
            *(scales.data_ptr(), found.data_ptr(), _threads()),
        )
        return found


def _attention_sizes(heads: Sequence[Tensor], sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Strides of rows, and the sizes that the kernel asks for."""
    assert all(_dense(part) for part in heads)
    query, key = heads[:2]
    sizes = [len(sequences.starts) - 1, query.shape[1], key.shape[1], query.shape[2], sequences.window]
    return torch.tensor([part.stride(0) for part in heads]), torch.tensor(sizes)


def decode_attention_serves(head_dim: int, group: int) -> bool:
    """Whether `attend` has heads of this size and groups of so many query heads."""
    return head_dim % (2 * LANES) == 0 and head_dim <= MAX_HEAD_DIM and group <= MAX_GROUP


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dense(heads: Tensor) -> bool:
    """Whether the heads of a row lie without gaps."""
    return heads.stride(2) == 1 and (heads.shape[1] == 1 or heads.stride(1) == heads.shape[2])


def _threads() -> int:
    return torch.get_num_threads()
