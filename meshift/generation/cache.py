"""Keys and values of the live sequences, and the attention that reads and writes them in a forward pass.

Knows nothing of sampling or of why a sequence is live; lengths and slots are told to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from meshift.models.attention import AttentionLayer, PackedAttention, capped_attention
from meshift.models.config import DecoderConfig

LENGTH_STEP = 32
"""Attention looks at whole multiples of this many positions, so that few different shapes occur."""


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

    def take(self, shape: Sequence[int], like: Tensor) -> "KVCache":
        """A cache of `shape`, with the device and dtype of `like`, in the old memory if that is large enough.

        The buffer is empty until the cache is given back with `put`: after a failed run it is not, since
        NaN left in unused positions would reach later sequences (0 x NaN is NaN under any mask).
        """
        buffers, self._buffers = self._buffers, None
        size = torch.Size(shape).numel()
        if not buffers or not _serves(buffers[0], size, like):
            del buffers  # before the new ones exist
            buffers = (like.new_zeros(size), like.new_zeros(size))
        return KVCache(buffers, shape)

    def put(self, cache: "KVCache") -> None:
        """Keep the memory of a cache whose run went well."""
        self._buffers = cache.buffers


def _serves(buffer: Tensor, size: int, like: Tensor) -> bool:
    return buffer.numel() >= size and buffer.dtype == like.dtype and buffer.device == like.device


class KVCache:
    """`keys`, `values`: [layers, slots, kv_heads, max_len, head_dim]; live sequences take the first slots.

    Positions that were never written hold some finite numbers, which every reader masks.
    """

    def __init__(self, buffers: tuple[Tensor, Tensor], shape: Sequence[int]):
        self.buffers = buffers
        size = torch.Size(shape).numel()
        self.keys, self.values = (buffer[:size].view(shape) for buffer in buffers)

    @staticmethod
    def shape(config: DecoderConfig, num_slots: int, max_len: int) -> tuple[int, ...]:
        """The shape of a cache for a decoder."""
        length = round_up(max_len, LENGTH_STEP)
        return (config.num_layers, num_slots, config.num_kv_heads, length, config.head_dim)

    def fill(self, start: int, stop: int, prefix: Prefix) -> None:
        """Begin the sequences of slots `start` to `stop` with the same prefix."""
        length = prefix.keys.shape[2]
        self.keys[:, start:stop, :, :length] = prefix.keys[:, None]
        self.values[:, start:stop, :, :length] = prefix.values[:, None]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of one slot to another."""
        for part in (self.keys, self.values):
            part[:, target, :, :length] = part[:, source, :, :length]


class StepAttention:
    """The attention of one forward pass over rows [one per live sequence | packed prompts | padding].

    Live row i belongs to slot i, which holds `live_lengths[i]` positions; its key and value are added
    there, and it attends to all of them, or to the last ones where the layer has a window. Prompts attend
    within themselves; their keys and values are kept for `prefixes`. Padding rows get zeros.
    """

    def __init__(self, cache: KVCache, live_lengths: Sequence[int], prompt_lengths: Sequence[int]):
        self._cache = cache
        self._num_live = len(live_lengths)
        self._ends = list(accumulate(prompt_lengths, initial=self._num_live))
        self._prompts = PackedAttention(prompt_lengths)
        self._prompt_keys: list[Tensor] = []
        self._prompt_values: list[Tensor] = []
        device = cache.keys.device
        self._lengths = torch.tensor(live_lengths, dtype=torch.int64, device=device)
        self._slots = torch.arange(self._num_live, device=device)
        self._shortest = min(live_lengths, default=0)
        self._reach = round_up(max(live_lengths, default=0) + 1, LENGTH_STEP)
        self._seen: dict[int | None, tuple[int, Tensor]] = {}

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `meshift.models.attention.Attention`."""
        live, prompts = slice(self._num_live), slice(self._num_live, self._ends[-1])
        parts = []
        if self._num_live:
            parts.append(self._attend_cached(layer, query[live], key[live], value[live]))
        if len(self._ends) > 1:
            self._prompt_keys.append(key[prompts])
            self._prompt_values.append(value[prompts])
            parts.append(self._prompts(layer, query[prompts], key[prompts], value[prompts]))
        if len(query) > self._ends[-1]:
            parts.append(query.new_zeros(len(query) - self._ends[-1], *query.shape[1:]))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _attend_cached(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """One query row per sequence. The query heads of a group become the rows of their shared key head."""
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        keys[self._slots, :, self._lengths] = key
        values[self._slots, :, self._lengths] = value
        first, visible = self._seen_within(layer.window)
        keys, values = (x[: self._num_live, :, first : self._reach] for x in (keys, values))
        if layer.softcap is not None:
            return capped_attention(query.unsqueeze(2), keys, values, visible.unsqueeze(1), layer).squeeze(2)
        grouped = query.unflatten(1, (key.shape[1], -1))
        attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible, scale=layer.scale)
        return attended.flatten(1, 2)

    def _seen_within(self, window: int | None) -> tuple[int, Tensor]:
        """The first position to look at, and which of those up to the reach each live row sees.

        The latter is bool [live, 1, 1, positions], made once for all layers of a window.
        """
        if window is not None and window >= self._reach:
            window = None
        if window not in self._seen:
            first = 0 if window is None else max(0, self._shortest + 1 - window) // LENGTH_STEP * LENGTH_STEP
            columns = torch.arange(first, self._reach, device=self._lengths.device)
            visible = columns <= self._lengths[:, None]
            if window is not None:
                visible &= columns > self._lengths[:, None] - window
            self._seen[window] = (first, visible[:, None, None])
        return self._seen[window]

    def prefixes(self, hidden: Tensor) -> list[Prefix]:
        """One for each prompt of the pass, from the rows [T, hidden] it ended with."""
        if len(self._ends) == 1:
            return []
        keys, values = (torch.stack(parts).transpose(1, 2) for parts in (self._prompt_keys, self._prompt_values))
        return [
            Prefix(
                keys=keys[:, :, start - self._num_live : end - self._num_live],
                values=values[:, :, start - self._num_live : end - self._num_live],
                hidden=hidden[end - 1],
            )
            for start, end in pairwise(self._ends)
        ]
