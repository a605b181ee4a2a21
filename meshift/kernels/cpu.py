"""The C kernels as functions of tensors: bfloat16 on a CPU. Knows nothing of models.

`kernels()` gives them, or None where torch's own have to do. What each computes stands in the C files beside this
one. Every call is deterministic: a row gets the same bits whatever else is in the call, however many threads run.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from meshift.kernels.build import cpu_flags
from meshift.kernels.library import built
from meshift.kernels.matrix_products import ACTIVATIONS, ProductKernels, address, threads

LANES = 16
MAX_HEAD_DIM = 256
MAX_GROUP = 16
"""Query heads of a key head that decode attention serves."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@cache
def kernels() -> "Kernels | None":
    """The kernels, where this machine has them."""
    library = built().library
    if library is None:
        return None
    keep_freed_pages()
    return Kernels(library)


def release_scratch() -> None:
    """Free the memory that kernels would use again, of this thread."""
    found = kernels()
    if found is not None:
        found.release()


def who_multiplies() -> str:
    """Whose kernels bfloat16 goes through on this machine's CPU, with a digest of their code."""
    if kernels() is None:
        return "torch's"
    own = f"Meshift's ({built().digest})"
    return own if products_for(torch.zeros(1, dtype=torch.bfloat16)) else f"{own}, products by torch"


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
class Sequences:
    """What packed attention has to know beside its rows: `starts` int64 [pieces + 1], `window` 0 for none.

    A piece is a whole sequence, or the rest of one after rows that it shares with others: `before` int64 [pieces]
    names the piece of those, or itself. Pieces that continue another stand right behind it.
    """

    starts: Tensor
    before: Tensor
    scale: float
    window: int = 0


class Kernels(ProductKernels):
    """See the module. Tensors are bfloat16 and contiguous unless a method says otherwise."""

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
            *(found.data_ptr(), address(inverses), threads()),
        )
        return found

    def turn(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> None:
        """Rotary in place: `heads` [T, heads, dim], dense but for the rows' stride; angles [T, 1, turned / 2]."""
        num_rows, num_heads, dim = heads.shape
        half = cosine.shape[-1]
        assert half % LANES == 0
        assert 2 * half <= dim
        assert len(cosine) == num_rows
        assert _dense(heads)
        self._library.turn(
            *(heads.data_ptr(), num_rows, heads.stride(0), num_heads, dim, half),
            *(cosine.data_ptr(), sine.data_ptr(), threads()),
        )

    def put(self, heads: Tensor, places: Tensor, target: Tensor) -> None:
        """Copy [T, heads, dim] to `places` [T, heads] (int64, counted in heads) of `target`."""
        num_rows, num_heads, dim = heads.shape
        assert _dense(heads)
        assert places.is_contiguous()
        assert target.is_contiguous()
        self._library.put(
            *(heads.data_ptr(), num_rows, heads.stride(0), num_heads, dim, places.data_ptr()),
            *(target.data_ptr(), threads()),
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
        assert decode_attention_serves(dim, num_heads // kv_heads)
        assert positions.dtype == torch.int64
        assert positions.is_contiguous()
        assert len(positions) == num_rows <= len(keys)
        found = query.new_empty(num_rows, num_heads, dim)
        self._library.attend(
            *(query.data_ptr(), num_rows, query.stride(0), kv_heads, num_heads // kv_heads, dim),
            *(keys.data_ptr(), values.data_ptr(), reach, positions.data_ptr(), window, scale),
            *(found.data_ptr(), threads()),
        )
        return found

    def decode(self, x: Tensor, layers: ctypes.Array, shape: ctypes.Structure, step: ctypes.Structure) -> None:
        """All layers of a decode step, in place on `x` [rows, hidden]: see `generation.whole_step`."""
        assert x.is_contiguous()
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
        assert all(0 <= token < vocab for token in forbidden.tolist())
        tokens = torch.empty(num_rows, dtype=torch.int64)
        logprobs = torch.empty(num_rows)
        sums = torch.empty(num_rows * math.ceil(vocab / 256), dtype=torch.float64)
        faulty = self._library.draw(
            *(logits.data_ptr(), num_rows, vocab, temperature, short.data_ptr()),
            *(forbidden.data_ptr(), len(forbidden), numbers.data_ptr(), sums.data_ptr()),
            *(tokens.data_ptr(), logprobs.data_ptr(), threads()),
        )
        return tokens, logprobs, int(faulty)

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
            *(int(plus_one), to_x.data_ptr(), shares.data_ptr(), to_weight.data_ptr(), threads()),
        )
        return to_x, to_weight

    def gate_backward(self, gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        """`activation(gate) * up` again, and the gradients of gate and up beside each other, [T, 2 n]."""
        num_rows, size = gate.shape
        product = self.scratch("gated", num_rows * size).view(num_rows, size)
        both = self.scratch("gate and up", num_rows * size * 2).view(num_rows, 2 * size)
        self._library.gate_backward(
            *(gate.data_ptr(), up.data_ptr(), grad.data_ptr(), num_rows, size, ACTIVATIONS[activation]),
            *(product.data_ptr(), both.data_ptr(), threads()),
        )
        return product, both

    def packed_attention(self, heads: Sequence[Tensor], sequences: Sequences, *, keep: bool) -> tuple[Tensor, ...]:
        """Causal attention of query, key and value [T, heads, dim] within each sequence: [T, heads, dim].

        A sequence's row gets the same bits whether or not it shares rows with others, unless it has a window.
        Beside it, where they are to be kept for the backward pass, the logarithms of the softmax's sums, fp32
        [T, heads].
        """
        num_rows, num_heads, dim = heads[0].shape
        out = heads[0].new_empty(num_rows, num_heads, dim)
        lse = torch.empty(num_rows, num_heads) if keep else None
        strides, sizes = _attention_sizes(heads, sequences)
        self._library.packed_attention(
            *(part.data_ptr() for part in heads),
            *(strides.data_ptr(), sequences.starts.data_ptr(), sequences.before.data_ptr()),
            *(sizes.data_ptr(), sequences.scale),
            *(out.data_ptr(), address(lse), threads()),
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
            *(strides.data_ptr(), sequences.starts.data_ptr(), sequences.before.data_ptr()),
            *(sizes.data_ptr(), sequences.scale),
            *(out.data_ptr(), lse.data_ptr(), grad.data_ptr()),
            *(part.data_ptr() for part in found),
            threads(),
        )
        return found

    def copy_rows(self, table: Tensor) -> None:
        """Copy rows of bytes between memory that is here, as int64 [count, 6] says: see `copy_rows.c`."""
        assert table.is_contiguous()
        self._library.copy_rows(table.data_ptr(), len(table), threads())

    def set_signal(self, number: Tensor, value: int) -> None:
        """Write the first of these int64 numbers, for other processes that map it, after all that was written."""
        self._library.set_signal(number.data_ptr(), value)

    def await_signals(self, numbers: Sequence[Tensor], value: int, seconds: float) -> bool:
        """Wait until the first number of each has become `value`, or more. False after so many seconds."""
        addresses = torch.tensor([number.data_ptr() for number in numbers], dtype=torch.int64)
        late: int = self._library.await_signals(addresses.data_ptr(), len(addresses), value, seconds)
        return late < 0

    def bit_sums(self, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of each row and column of int16 or int32 [rows, columns], in int64. Raises `MemoryError`."""
        assert bits.is_contiguous()
        num_rows, num_columns = bits.shape
        of_rows, of_columns = torch.empty(num_rows, dtype=torch.int64), torch.zeros(num_columns, dtype=torch.int64)
        done = self._library.bit_sums(
            *(bits.data_ptr(), num_rows, num_columns, bits.element_size()),
            *(of_rows.data_ptr(), of_columns.data_ptr(), threads()),
        )
        if not done:
            raise MemoryError(f"there is no memory for the sums of {num_columns} columns")
        return of_rows, of_columns

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
            *(found.data_ptr(), address(entropies), address(correct), threads()),
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
            *(scales.data_ptr(), found.data_ptr(), threads()),
        )
        return found


def _attention_sizes(heads: Sequence[Tensor], sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Strides of rows, and the sizes that the kernel asks for."""
    assert all(_dense(part) for part in heads)
    query, key = heads[:2]
    assert packed_attention_serves(query.shape[2])
    assert query.shape[1] % key.shape[1] == 0
    assert len(sequences.before) == len(sequences.starts) - 1
    sizes = [len(sequences.starts) - 1, query.shape[1], key.shape[1], query.shape[2], sequences.window]
    return torch.tensor([part.stride(0) for part in heads]), torch.tensor(sizes)


def decode_attention_serves(head_dim: int, group: int) -> bool:
    """Whether `attend` has heads of this size and groups of so many query heads."""
    return packed_attention_serves(head_dim) and group <= MAX_GROUP


def packed_attention_serves(head_dim: int) -> bool:
    """Whether `packed_attention` has heads of this size."""
    return head_dim % (2 * LANES) == 0 and head_dim <= MAX_HEAD_DIM


def _dense(heads: Tensor) -> bool:
    """Whether the heads of a row lie without gaps."""
    return heads.stride(2) == 1 and (heads.shape[1] == 1 or heads.stride(1) == heads.shape[2])
