"""The cache and its attention: against plain attention over whole sequences."""

import pytest
import torch

from meshift.generation.cache import CacheBuffer, KVCache, Prefix, StepAttention
from meshift.models.attention import AttentionLayer, PlainAttention

LAYERS, HEADS, KV_HEADS, DIM = 2, 6, 2, 8


def rows(num_rows, heads, seed):
    return torch.randn(num_rows, heads, DIM, generator=torch.Generator().manual_seed(seed))


def new_cache(num_slots=5, max_len=64):
    return CacheBuffer().take((LAYERS, num_slots, KV_HEADS, max_len, DIM), like=torch.zeros(1))


@pytest.mark.parametrize("cached", [[3, 40, 1], [70, 38, 50]])
@pytest.mark.parametrize("window", [None, 1, 5, 39, 200])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_one_mixed_pass_equals_plain_attention_over_the_whole_sequences(cached, window, softcap):
    layer = AttentionLayer(index=1, scale=DIM**-0.5, window=window, softcap=softcap)
    cache, prompts = new_cache(max_len=96), [4, 2]
    lengths = [*(length + 1 for length in cached), *prompts]
    query, key, value = (
        rows(sum(lengths), heads, heads + i) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    expected = PlainAttention(lengths)(layer, query, key, value)
    starts = [sum(lengths[:i]) for i in range(4)]
    for slot, length in enumerate(cached):
        past = slice(starts[slot], starts[slot] + length)
        whole = [part[past].transpose(0, 1).expand(LAYERS, -1, -1, -1) for part in (key, value)]
        cache.fill(slot, slot + 1, Prefix(keys=whole[0], values=whole[1], hidden=torch.empty(0)))
    taken = [start + length for start, length in zip(starts, cached, strict=False)]
    taken += range(starts[3], sum(lengths))
    padded = [torch.cat([part[taken], torch.zeros(3, *part.shape[1:])]) for part in (query, key, value)]
    ours = StepAttention(cache, cached, prompts)(layer, *padded)
    torch.testing.assert_close(ours[:-3], expected[taken], atol=1e-5, rtol=0)
    assert not ours[-3:].any()


def test_prefixes_are_the_keys_values_and_last_hidden_rows_of_each_prompt():
    attention = StepAttention(new_cache(), [2], [3, 1])
    key, value, hidden = rows(8, KV_HEADS, 0), rows(8, KV_HEADS, 1), rows(8, 1, 2)[:, 0]
    for index in range(LAYERS):
        layer = AttentionLayer(index=index, scale=1.0)
        attention(layer, rows(8, HEADS, 3), key + index, value)
    first, second = attention.prefixes(hidden)
    torch.testing.assert_close(first.keys[1], key[1:4].transpose(0, 1) + 1)
    torch.testing.assert_close(second.values[0], value[4:5].transpose(0, 1))
    assert first.hidden.equal(hidden[3])
    assert second.hidden.equal(hidden[4])


def test_a_move_takes_all_layers_of_the_first_positions():
    cache = new_cache()
    cache.keys.copy_(torch.randn(cache.keys.shape))
    before = cache.keys.clone()
    cache.move(4, 1, 10)
    assert cache.keys[:, 1, :, :10].equal(before[:, 4, :, :10])
    assert cache.keys[:, 1, :, 10:].equal(before[:, 1, :, 10:])


def test_memory_is_kept_between_calls_grown_when_needed_and_not_kept_after_a_failure():
    buffer, like = CacheBuffer(), torch.zeros(1)
    first = buffer.take((1, 4, 2, 32, 8), like)
    buffer.put(first)
    smaller = buffer.take((1, 2, 2, 64, 8), like)
    assert smaller.keys.data_ptr() == first.keys.data_ptr()
    first.keys.fill_(float("nan"))
    assert not buffer.take((1, 2, 2, 64, 8), like).keys.isnan().any()  # `smaller` was never put back
    buffer.put(smaller)
    assert buffer.take((1, 4, 2, 64, 8), like).keys.shape == (1, 4, 2, 64, 8)


def test_another_dtype_gets_memory_of_its_own():
    buffer = CacheBuffer()
    buffer.put(buffer.take((1, 1, 1, 32, 8), torch.zeros(1)))
    assert buffer.take((1, 1, 1, 32, 8), torch.zeros(1, dtype=torch.bfloat16)).keys.dtype == torch.bfloat16


def test_the_cache_has_room_for_the_longest_sequence(model):
    assert KVCache.shape(model.config, 3, 33) == (2, 3, 2, 64, 8)
