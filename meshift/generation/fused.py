"""The decoder's forward pass without gradients, in as few kernels as it takes: what generation runs.

The same arithmetic as `Decoder` and its head (tests hold them together), over matrices of `matrices.py`. An
`Attention` is handed in, as there; of what is in a cache it knows nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from meshift.generation.cache import DecodeAttention
from meshift.generation.matrices import (
    Fingerprint,
    KernelMatrix,
    Matrix,
    can_pack,
    fingerprint,
    make_matrix,
    pack,
)
from meshift.generation.whole_step import WholeStep, whole_step
from meshift.kernels.cpu import ACTIVATIONS as KERNEL_ACTIVATIONS
from meshift.kernels.cpu import LANES, kernels_for
from meshift.models.attention import Attention
from meshift.models.decoder import Decoder, Layer, SelfAttention
from meshift.models.heads import LanguageModelHead
from meshift.models.norm import norm_rows
from meshift.models.rotary import Angles, doubled, turn_

Turn = Callable[[Tensor], None]
"""Turns heads [T, heads, head_dim] in place."""


@dataclass(frozen=True, kw_only=True)
class LayerMatrices:
    """The products of one layer. `gate` is None for a plain MLP."""

    qkv: Matrix
    output: Matrix
    gate: Matrix | None
    up: Matrix
    down: Matrix

    @classmethod
    def of(cls, layer: Layer) -> "LayerMatrices":
        """Made from a layer's weights as they are now."""
        attention, mlp = layer.attention, layer.mlp
        return cls(
            qkv=make_matrix([attention.query, attention.key, attention.value]),
            output=make_matrix([attention.output]),
            gate=None if mlp.gate is None else make_matrix([mlp.gate]),
            up=make_matrix([mlp.up]),
            down=make_matrix([mlp.down]),
        )

    @property
    def named(self) -> dict[str, Matrix | None]:
        """Every matrix by its name."""
        return {"qkv": self.qkv, "output": self.output, "gate": self.gate, "up": self.up, "down": self.down}

    def widen(self, rows: Tensor, activation: str) -> Tensor:
        """The rows inside the MLP: activated, and times the gate where there is one."""
        gate, up = self.gate, self.up
        if gate is None:
            return up(rows, activation)
        if isinstance(up, KernelMatrix) and isinstance(gate, KernelMatrix) and activation in KERNEL_ACTIVATIONS:
            return up.gated(rows, gate, activation)
        return up.times(rows, gate(rows, activation))

    @property
    def num_bytes(self) -> int:
        """Memory beside the model's own parameters."""
        return sum(matrix.num_bytes for matrix in self.named.values() if matrix is not None)


class FusedDecoder:
    """`forward` and `logits` of a model, from packed copies of its weights where those pay.

    `refresh` before each use: it compares the model's fingerprint with that of the weights that were packed, and
    packs anew where it differs, so that no stale weight is ever multiplied by. `release` frees the copies.
    """

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self._layers: list[LayerMatrices] = []
        self._head: Matrix | None = None
        self._logits = torch.empty(0)
        self._whole: WholeStep | None = None
        self._packed_from: Fingerprint | None = None

    @property
    def packs(self) -> bool:
        """Whether this model's weights are copied into another layout."""
        return can_pack(next(self.model.parameters()))

    @property
    def takes_any_rows(self) -> bool:
        """Whether a row's bits are the same at every number of rows, so that none need be added."""
        return self._whole is not None

    @property
    def num_bytes(self) -> int:
        """Memory of the copies; 0 before the first `refresh` and after `release`."""
        head = 0 if self._head is None else self._head.num_bytes
        return head + sum(layer.num_bytes for layer in self._layers)

    def refresh(self) -> None:
        """See the weights as they are now."""
        current = fingerprint(self.model) if self.packs else None
        if current is not None and current == self._packed_from:
            return
        self.release()
        self._layers = [LayerMatrices.of(layer) for layer in self.model.layers if isinstance(layer, Layer)]
        if self.packs:
            self._head = pack([_head_of(self.model).projection]) if self.model.ends else None
            self._whole = whole_step(self.model, self._layers)
        self._packed_from = current

    def release(self) -> None:
        """Free the copies."""
        self._layers, self._head, self._packed_from, self._whole = [], None, None, None
        self._logits = torch.empty(0)

    def forward(
        self, tokens: Tensor, positions: Tensor, attention: Attention, entering: Tensor | None = None
    ) -> Tensor:
        """Hidden rows [T, hidden] as `Decoder.forward` gives them, without gradients; may change `entering`."""
        x = self.model.embedding(tokens, positions) if entering is None else entering
        angles = [rotary(positions, x.dtype) for rotary in self.model.rotaries]
        if self._whole is not None and isinstance(attention, DecodeAttention):
            return self._leave(self._whole.run(x, angles, attention))
        turns = [_turner(one) for one in angles]
        for layer, matrices in zip(self.model.layers, self._layers, strict=True):
            assert isinstance(layer, Layer)
            x = _attend(x, layer, matrices, turns, attention)
            x = _widen(x, layer, matrices)
        return self._leave(x)

    def _leave(self, x: Tensor) -> Tensor:
        return norm_rows(self.model.norm, x) if self.model.ends else x

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, vocab] as the model's head gives them, or not rounded, in fp32, where kernels can.

        In the latter case they stand in memory that the next call uses again.
        """
        head = _head_of(self.model)
        if self._head is None:
            return head(hidden)
        if isinstance(self._head, KernelMatrix):
            return head.vocabulary.whole(head.cap(self._head.wide(hidden, self._room(len(hidden)))))
        return head.vocabulary.whole(head.cap(self._head(hidden)))

    def _room(self, num_rows: int) -> Tensor:
        """Memory for fp32 logits; fresh pages at every step would cost as much as filling them."""
        vocab = len(_head_of(self.model).projection)
        if self._logits.numel() < num_rows * vocab:
            self._logits = torch.empty(num_rows * vocab)
        return self._logits[: num_rows * vocab].view(num_rows, vocab)


def _head_of(model: Decoder) -> LanguageModelHead:
    assert isinstance(model.head, LanguageModelHead)
    return model.head


def _attend(
    x: Tensor, layer: Layer, matrices: LayerMatrices, turns: Sequence[Turn], attention: Attention
) -> Tensor:
    """x + attention(x), with the layer's norms."""
    module = layer.attention
    query, key, value = _query_key_value(matrices.qkv(_norm(layer.attention_norm, x)), module, turns)
    attended = attention(module.layer, query, key, value).flatten(1)
    return _add(x, attended, matrices.output, layer.attention_post_norm)


def _query_key_value(rows: Tensor, module: SelfAttention, turns: Sequence[Turn]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the fused product [T, numbers] -> queries, keys, values [T, heads, head_dim], turned."""
    num_keys = module.key.out_features // module.head_dim
    heads = rows.unflatten(-1, (-1, module.head_dim))
    turned, value = heads[:, :-num_keys], heads[:, -num_keys:]
    query, key = turned[:, :-num_keys], turned[:, -num_keys:]
    parts = [turned]
    if module.query_norm is not None:
        query = module.heads(query.flatten(1), module.query_norm)
        key = module.heads(key.flatten(1), module.key_norm)
        parts = [query, key]
    if module.rotary is not None:
        for part in parts:
            turns[module.rotary](part)
    return query, key, value


def _turner(angles: Angles) -> Turn:
    """Rotary by these angles, in place."""
    cosine, sine = angles
    kernels = kernels_for(cosine)
    if kernels is not None and cosine.shape[-1] % LANES == 0:
        return partial(kernels.turn, cosine=cosine, sine=sine)
    wide = doubled(angles)
    return lambda heads: turn_(heads, *wide)


def _widen(x: Tensor, layer: Layer, matrices: LayerMatrices) -> Tensor:
    """x + mlp(x), with the layer's norms."""
    wide = matrices.widen(_norm(layer.mlp_norm, x), layer.mlp.activation_name)
    return _add(x, wide, matrices.down, layer.mlp_post_norm)


def _add(x: Tensor, rows: Tensor, matrix: Matrix, post_norm: nn.Module | None) -> Tensor:
    return matrix.plus(rows, x) if post_norm is None else x + norm_rows(post_norm, matrix(rows))


def _norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else norm_rows(norm, x)
