"""Keys and values of the live sequences, and the attentions that read and write them in a forward pass.

Knows nothing of sampling or of why a sequence is live; lengths and slots are told to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from meshift.kernels.cpu import decode_attention_serves, kernels_for
from meshift.models.attention import PackedAttention, packed_positions
from meshift.models.decoder import Decoder
from meshift.models.masked_attention import AttentionLayer, capped_attention

LENGTH_STEP = 32
"""Attention looks at whole multiples of this many positions, so that few different shapes occur."""
WINDOW_GAIN = 4
"""On a CPU, products with a slice of the positions take this many times as long as with all of them."""


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A prompt that was run once: what every completion of it starts from.

    `keys` and `values` are [layers, kv_heads, length, head_dim]; `hidden` [hidden] is the row of its last
    token.
    """

    keys: Tensor
    values: Tensor
    hidden: Tensor


class CacheBuffer:
    """Memory that outlives a call of the engine: on a CPU fresh pages cost more than what is copied there."""

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the kept memory; 0 while a cache uses it."""
        return sum(buffer.nbytes for buffer in self._buffers or ())

    def take(
        self, shape: Sequence[int], like: Tensor, *, first_layer: int = 0, for_kernels: bool = False
    ) -> "KVCache":
        """A cache of `shape`, with the device and dtype of `like`, in the old memory if that is large enough.

        The buffer is empty until the cache is given back with `put`: after a failed run it is not, since
        NaN left in unused positions would reach later sequences (0 x NaN is NaN under any mask).
        """
        buffers, self._buffers = self._buffers, None
        size = torch.Size(shape).numel()
        if not buffers or not _serves(buffers[0], size, like):
            del buffers  # before the new ones exist
            buffers = (like.new_zeros(size), like.new_zeros(size))
        return KVCache(buffers, shape, first_layer=first_layer, for_kernels=for_kernels)

    def put(self, cache: "KVCache") -> None:
        """Keep the memory of a cache whose run went well."""
        self._buffers = cache.buffers


def _serves(buffer: Tensor, size: int, like: Tensor) -> bool:
    return buffer.numel() >= size and buffer.dtype == like.dtype and buffer.device == like.device


class KVCache:
    """`keys`, `values`: [layers, slots, kv_heads, reach, head_dim]; live sequences take the first slots.

    Positions that were never written hold some finite numbers, which every reader masks. On a CPU the `reach`
    grows with the sequences, up to the `max_len` of the shape, and a layer's positions lie without gaps: torch's
    matrix products take four times as long over a slice. Elsewhere, and where our own kernels read it, the reach
    is `max_len` from the start. Its layers are those from the model's `first_layer` on.
    """

    def __init__(
        self,
        buffers: tuple[Tensor, Tensor],
        shape: Sequence[int],
        *,
        first_layer: int = 0,
        for_kernels: bool = False,
    ):
        self.buffers = buffers
        self._first_layer = first_layer
        self._shape = torch.Size(shape)
        self._kernels = kernels_for(buffers[0])
        grows = buffers[0].device.type == "cpu" and not (for_kernels and self._kernels is not None)
        self.reach = LENGTH_STEP if grows else shape[3]
        self.keys, self.values = self._views()

    @staticmethod
    def shape(model: Decoder, num_slots: int, max_len: int) -> tuple[int, ...]:
        """The shape of a cache for the layers and the key-value heads that are here."""
        longest, dim = round_up(max_len, LENGTH_STEP), model.config.head_dim
        return (len(model.layers), num_slots, model.num_kv_heads, longest, dim)

    def _views(self) -> tuple[Tensor, Tensor]:
        num_layers, slots, heads, _, dim = self._shape
        used = slots * heads * self.reach * dim
        keys, values = (
            buffer[: self._shape.numel()].view(num_layers, -1)[:, :used].unflatten(1, (slots, heads, -1, dim))
            for buffer in self.buffers
        )
        return keys, values

    def grow(self, length: int, num_used: int) -> None:
        """Make room for `length` positions, keeping those of the first `num_used` slots."""
        if length <= self.reach:
            return
        before, old = (self.keys, self.values), self.reach
        self.reach = min(round_up(length, LENGTH_STEP), self._shape[3])
        self.keys, self.values = self._views()
        if num_used == 0:
            return
        for narrow, wide in zip(before, (self.keys, self.values), strict=True):
            for source, target in zip(narrow, wide, strict=True):  # a layer's old and new places overlap
                target[:num_used, :, :old] = source[:num_used].clone()

    def places(self, slots: Tensor, positions: Tensor) -> Tensor:
        """For row i, the places of slot `slots[i]` and position `positions[i]` in a layer, int64 [T, kv_heads]."""
        heads = self._shape[2]
        first = (slots * heads).unsqueeze(1) + torch.arange(heads, device=slots.device)
        return first * self.reach + positions.unsqueeze(1)

    def write(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Put rows [T, kv_heads, head_dim] at their places."""
        for rows, stored in zip((key, value), self.of(layer), strict=True):
            if self._kernels is not None:
                self._kernels.put(rows, places, stored)
            else:
                stored.view(-1, self._shape[4]).index_put_((places,), rows)

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer with this index in the whole model."""
        return self.keys[layer - self._first_layer], self.values[layer - self._first_layer]

    def prefix(self, slot: int, length: int, hidden: Tensor) -> Prefix:
        """A copy of what a slot holds."""
        keys, values = (part[:, slot, :, :length].clone() for part in (self.keys, self.values))
        return Prefix(keys=keys, values=values, hidden=hidden)

    def fill(self, start: int, stop: int, prefix: Prefix) -> None:
        """Begin the sequences of slots `start` to `stop` with the same prefix."""
        length = prefix.keys.shape[2]
        self.keys[:, start:stop, :, :length] = prefix.keys[:, None]
        self.values[:, start:stop, :, :length] = prefix.values[:, None]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]

    def spread(self, source: int, stop: int, length: int) -> None:
        """Copy the first `length` positions of a slot to those from the next one to `stop`."""
        if stop > source + 1:
            for part in (self.keys, self.values):
                part[:, source + 1 : stop, :, :length] = part[:, source : source + 1, :, :length]


class PromptAttention:
    """The attention of a pass over packed prompts and padding rows: each prompt within itself.

    Keys and values go to the cache, prompt i's to slot `slots[i]`. Padding rows get zeros.
    """

    def __init__(self, cache: KVCache, lengths: Sequence[int], slots: Sequence[int]):
        self._cache = cache
        self._num_rows = sum(lengths)
        self._packed = PackedAttention(lengths)
        rows = torch.repeat_interleave(torch.tensor(slots), torch.tensor(lengths))
        self._places = cache.places(rows, packed_positions(lengths)).to(cache.keys.device)
        self.last_rows = [end - 1 for end in accumulate(lengths)]

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `meshift.models.attention.Attention`."""
        num_padding = len(query) - self._num_rows
        query, key, value = (rows[: self._num_rows] for rows in (query, key, value))
        self._cache.write(layer.index, self._places, key, value)
        attended = self._packed(layer, query, key, value)
        return F.pad(attended, (0, 0, 0, 0, 0, num_padding)) if num_padding else attended


class DecodeAttention:
    """The attention of a decode step: row i is the newest token of slot i, at `positions[i]` (int64 [rows]).

    Its key and value are added there, and it attends to all positions up to its own, or to the last ones where the
    layer has a window. Rows behind the live ones may write to their slots, which are free. `shortest` and
    `longest` are the least and greatest position of a live row; all shapes follow from the number of rows and the
    cache's reach.
    """

    def __init__(self, cache: KVCache, positions: Tensor, *, shortest: int, longest: int):
        self.cache = cache
        self.positions = positions
        self._shortest = shortest
        self._reach = min(round_up(longest + 1, LENGTH_STEP), cache.reach)
        self._on_cpu = positions.device.type == "cpu"
        self._kernels = kernels_for(cache.keys)
        self.places = cache.places(torch.arange(len(positions), device=positions.device), positions)
        self._seen: dict[int | None, tuple[int, Tensor, Tensor]] = {}

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `meshift.models.attention.Attention`."""
        self.cache.write(layer.index, self.places, key, value)
        if self._kernels is not None and _kernel_serves(layer, query, key):
            stored = self.cache.of(layer.index)
            window = layer.window or 0
            return self._kernels.attend(query, *stored, self.positions, window=window, scale=layer.scale)
        first, visible, mask = self._seen_within(layer.window, query.dtype)
        stored = self.cache.of(layer.index)
        keys, values = (part[: len(query), :, first : self._reach] for part in stored)
        if layer.softcap is not None:
            return capped_attention(query.unsqueeze(2), keys, values, visible.unsqueeze(1), layer).squeeze(2)
        grouped = query.unflatten(1, (key.shape[1], -1))  # the query heads of a group: rows of their key head
        if self._on_cpu:
            return _attend_in_products(grouped, keys, values, mask, layer.scale).flatten(1, 2)
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=layer.scale)
        return attended.flatten(1, 2)

    def _seen_within(self, window: int | None, dtype: torch.dtype) -> tuple[int, Tensor, Tensor]:
        """The first position to look at, and which of those up to the reach each row sees.

        The latter as bool [rows, 1, 1, positions] and as 0 or -inf in `dtype`, once for all layers of a window.
        """
        if window is not None and window >= self._reach:
            window = None
        if window not in self._seen:
            first = self._first(window)
            columns = torch.arange(first, self._reach, device=self.positions.device)
            visible = columns <= self.positions[:, None]
            if window is not None:
                visible &= columns > self.positions[:, None] - window
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
            mask.masked_fill_(~visible, float("-inf"))
            self._seen[window] = (first, visible[:, None, None], mask[:, None, None])
        return self._seen[window]

    def _first(self, window: int | None) -> int:
        """Where to begin: at the first position that some row sees, where leaving the others out pays."""
        if window is None:
            return 0
        first = max(0, self._shortest + 1 - window) // LENGTH_STEP * LENGTH_STEP
        pays = not self._on_cpu or (self._reach - first) * WINDOW_GAIN < self._reach
        return first if pays else 0


def _kernel_serves(layer: AttentionLayer, query: Tensor, key: Tensor) -> bool:
    """Whether the CPU kernel has this head's size and the group's, and no cap is to be put on scores."""
    return layer.softcap is None and decode_attention_serves(query.shape[2], query.shape[1] // key.shape[1])


def _attend_in_products(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of [rows, kv_heads, group, dim] queries as two batched products, [rows, kv_heads, group, dim].

    With so few queries to a head, torch's fused attention takes twice as long on a CPU.
    """
    shape = query.shape
    scores = torch.bmm(query.flatten(0, 1), keys.flatten(0, 1).mT).view(*shape[:3], -1)
    weights = torch.add(mask, scores, alpha=scale).softmax(dim=-1)
    return torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).view(shape)
