"""All layers of a decode step in one call of a CPU kernel, where a model is of the plain kind that it serves.

The same kernels in the same order as layer by layer (tests hold them equal, bit for bit), without Python in
between, which takes a third of the step where there are few rows. Knows nothing of embedding, head or sampling.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from meshift.generation.cache import DecodeAttention
from meshift.generation.matrices import KernelMatrix, Matrix
from meshift.kernels.cpu import LANES, Kernels, decode_attention_serves, kernels_for
from meshift.kernels.matrix_products import ACTIVATIONS, threads
from meshift.models.decoder import Decoder, Layer
from meshift.models.norm import PlusOneRMSNorm, RMSNorm
from meshift.models.rotary import Angles, Rotary

MAX_ROTARIES = 4


LAYER_POINTERS = (
    *("attention_norm", "qkv", "qkv_bias", "output", "output_bias"),
    *("mlp_norm", "gate", "gate_bias", "up", "up_bias", "down", "down_bias"),
)
SHAPE_COUNTS = ("hidden", "wide", "heads", "kv_heads", "dim", "half", "activation", "plus_one")


class WholeLayer(ctypes.Structure):
    """`Layer` of decode.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in LAYER_POINTERS),
        *((name, ctypes.c_int64) for name in ("window", "rotary")),
        ("scale", ctypes.c_double),
    )


class WholeShape(ctypes.Structure):
    """`Shape` of decode.c."""

    _fields_ = (*((name, ctypes.c_int64) for name in SHAPE_COUNTS), ("eps", ctypes.c_double))


class WholeRows(ctypes.Structure):
    """`Step` of decode.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "reach", "layer_stride", "threads")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "places", "positions")),
        ("cosines", ctypes.c_void_p * MAX_ROTARIES),
        ("sines", ctypes.c_void_p * MAX_ROTARIES),
    )


class Matrices(Protocol):
    """The matrices of a layer (`fused.LayerMatrices`)."""

    @property
    def named(self) -> dict[str, Matrix | None]:
        """By name: qkv, output, gate, up, down."""


class WholeStep:
    """`run` is `FusedDecoder`'s way through the layers. Pointers are of the weights as they were packed."""

    def __init__(self, kernels: Kernels, model: Decoder, matrices: Sequence[Matrices]) -> None:
        self._kernels = kernels
        self._model = model
        self._matrices = matrices  # these two keep what is pointed at
        self._vectors = [parameter.data for parameter in model.parameters() if parameter.dim() == 1]
        layers = [layer for layer in model.layers if isinstance(layer, Layer)]
        described = [_describe(layer, own) for layer, own in zip(layers, matrices, strict=True)]
        self._layers = (WholeLayer * len(layers))(*described)
        self._shape = _shape(model)

    def run(self, x: Tensor, angles: Sequence[Angles], attention: DecodeAttention) -> Tensor:
        """[rows, hidden] through all layers, in place."""
        cache = attention.cache
        step = WholeRows(
            rows=len(x),
            threads=threads(),
            reach=cache.reach,
            layer_stride=cache.keys.stride(0),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            places=attention.places.data_ptr(),
            positions=attention.positions.data_ptr(),
        )
        for number, (cosine, sine) in enumerate(angles):
            step.cosines[number], step.sines[number] = cosine.data_ptr(), sine.data_ptr()
        self._kernels.decode(x, self._layers, self._shape, step)
        return x


def whole_step(model: Decoder, matrices: Sequence[Matrices]) -> WholeStep | None:
    """For a model that the kernel serves: norms before, nothing but a turn between product and attention."""
    kernels = kernels_for(next(model.parameters()))
    layers = [layer for layer in model.layers if isinstance(layer, Layer)]
    if kernels is None or not layers or len(model.rotaries) > MAX_ROTARIES:
        return None
    served = all(_serves(layer, own) for layer, own in zip(layers, matrices, strict=True))
    halves = _halves(model)
    turns = len(halves) <= 1 and all(half % LANES == 0 for half in halves)
    config = model.config
    group = (layers[0].attention.query.out_features // config.head_dim) // model.num_kv_heads
    if not (served and turns and decode_attention_serves(config.head_dim, group)):
        return None
    return WholeStep(kernels, model, matrices)


def _halves(model: Decoder) -> set[int]:
    """Half the turned dims of a head, of every kind of rotary."""
    return {rotary.inv_freq.numel() for rotary in model.rotaries if isinstance(rotary, Rotary)}


def _serves(layer: Layer, matrices: Matrices) -> bool:
    norms = (layer.attention_norm, layer.mlp_norm)
    plain = all(type(norm) in (RMSNorm, PlusOneRMSNorm) for norm in norms)
    bare = layer.attention_post_norm is None and layer.mlp_post_norm is None and layer.attention.query_norm is None
    packed = all(isinstance(matrix, KernelMatrix) for matrix in matrices.named.values())
    fits = layer.attention.layer.softcap is None and layer.mlp.activation_name in ACTIVATIONS
    return plain and bare and packed and fits


def _describe(layer: Layer, matrices: Matrices) -> WholeLayer:
    found = WholeLayer()
    for name, matrix in matrices.named.items():
        assert isinstance(matrix, KernelMatrix)
        setattr(found, name, matrix.weight.values.data_ptr())
        setattr(found, f"{name}_bias", None if matrix.bias is None else matrix.bias.data_ptr())
    for name in ("attention_norm", "mlp_norm"):
        norm = getattr(layer, name)
        setattr(found, name, norm.weight.data_ptr())
    attention = layer.attention
    found.window = attention.layer.window or 0
    found.rotary = -1 if attention.rotary is None else attention.rotary
    found.scale = attention.layer.scale
    return found


def _shape(model: Decoder) -> WholeShape:
    layer = model.first_layer
    assert isinstance(layer.attention_norm, RMSNorm)
    config = model.config
    return WholeShape(
        hidden=config.hidden_size,
        wide=layer.mlp.up.out_features,
        heads=layer.attention.query.out_features // config.head_dim,
        kv_heads=model.num_kv_heads,
        dim=config.head_dim,
        half=max(_halves(model), default=0),
        activation=ACTIVATIONS[layer.mlp.activation_name],
        plus_one=int(isinstance(layer.attention_norm, PlusOneRMSNorm)),
        eps=layer.attention_norm.eps,
    )
