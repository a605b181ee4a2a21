"""The cache and its attention: against plain attention over whole sequences."""

import pytest
import torch

from meshift.generation.cache import CacheBuffer, DecodeAttention, KVCache, Prefix, PromptAttention
from meshift.models.attention import PlainAttention
from meshift.models.masked_attention import AttentionLayer

LAYERS, HEADS, KV_HEADS, DIM = 2, 6, 2, 8


def rows(num_rows, heads, seed):
    return torch.randn(num_rows, heads, DIM, generator=torch.Generator().manual_seed(seed))


def new_cache(num_slots=5, max_len=64):
    return CacheBuffer().take((LAYERS, num_slots, KV_HEADS, max_len, DIM), like=torch.zeros(1))


@pytest.mark.parametrize("cached", [[3, 40, 1], [70, 38, 50]])
@pytest.mark.parametrize("window", [None, 1, 5, 39, 200])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_a_decode_step_equals_plain_attention_over_the_whole_sequences(cached, window, softcap):
    layer = AttentionLayer(index=1, scale=DIM**-0.5, window=window, softcap=softcap)
    cache, lengths = new_cache(max_len=96), [length + 1 for length in cached]
    query, key, value = (
        rows(sum(lengths), heads, heads + i) for i, heads in enumerate((HEADS, KV_HEADS, KV_HEADS))
    )
    expected = PlainAttention(lengths)(layer, query, key, value)
    cache.grow(max(lengths), 0)
    newest = []
    for slot, length in enumerate(cached):
        start = sum(lengths[:slot])
        past = slice(start, start + length)
        whole = [part[past].transpose(0, 1).expand(LAYERS, -1, -1, -1) for part in (key, value)]
        cache.fill(slot, slot + 1, Prefix(keys=whole[0], values=whole[1], hidden=torch.empty(0)))
        newest.append(start + length)
    padded = [torch.cat([part[newest], torch.ones(2, *part.shape[1:])]) for part in (query, key, value)]
    positions = torch.tensor([*cached, max(cached), max(cached)])
    attention = DecodeAttention(cache, positions, shortest=min(cached), longest=max(cached))
    ours = attention(layer, *padded)
    torch.testing.assert_close(ours[:3], expected[newest], atol=1e-5, rtol=0)
    assert ours.isfinite().all(), "NaN of padding rows would reach free slots"


def test_prompts_attend_within_themselves_and_leave_their_keys_and_values_in_their_slots():
    cache, lengths = new_cache(), [3, 1]
    query, key, value = rows(6, HEADS, 3), rows(6, KV_HEADS, 0), rows(6, KV_HEADS, 1)
    attention = PromptAttention(cache, lengths, [3, 1])
    for index in range(LAYERS):
        layer = AttentionLayer(index=index, scale=1.0)
        ours = attention(layer, query, key + index, value)
        expected = PlainAttention(lengths)(layer, query[:4], key[:4] + index, value[:4])
        torch.testing.assert_close(ours[:4], expected, atol=1e-5, rtol=0)
        assert not ours[4:].any()
    assert attention.last_rows == [2, 3]
    hidden = torch.ones(1)
    first, second = cache.prefix(3, 3, hidden), cache.prefix(1, 1, hidden)
    torch.testing.assert_close(first.keys[1], key[:3].transpose(0, 1) + 1)
    torch.testing.assert_close(second.values[0], value[3:4].transpose(0, 1))


def test_growing_keeps_what_the_used_slots_hold():
    cache = new_cache(max_len=160)
    assert cache.reach == 32
    for part in (cache.keys, cache.values):
        part.copy_(torch.randn(part.shape))
    before = cache.keys.clone(), cache.values.clone()
    cache.grow(20, 5)
    assert cache.reach == 32
    for length, reach in ((33, 64), (128, 128), (130, 160)):
        cache.grow(length, 4)
        assert cache.keys.shape == (LAYERS, 5, KV_HEADS, reach, DIM)
        for part, old in zip((cache.keys, cache.values), before, strict=True):
            assert part[:, :4, :, :32].equal(old[:, :4])
            assert part[0].is_contiguous(), "products over a slice take four times as long"


def test_spreading_copies_a_prompt_to_the_slots_after_its_own():
    cache = new_cache()
    cache.keys.copy_(torch.randn(cache.keys.shape))
    before = cache.keys.clone()
    cache.spread(1, 4, 7)
    for slot in (2, 3):
        assert cache.keys[:, slot, :, :7].equal(before[:, 1, :, :7])
    assert cache.keys[:, [0, 1, 4]].equal(before[:, [0, 1, 4]])
    assert cache.keys[:, 2:4, :, 7:].equal(before[:, 2:4, :, 7:])


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
    for part in first.buffers:
        part.fill_(float("nan"))
    assert not buffer.take((1, 2, 2, 64, 8), like).keys.isnan().any()  # `smaller` was never put back
    buffer.put(smaller)
    grown = buffer.take((1, 4, 2, 64, 8), like)
    grown.grow(64, 0)
    assert grown.keys.shape == (1, 4, 2, 64, 8)


def test_another_dtype_gets_memory_of_its_own():
    buffer = CacheBuffer()
    buffer.put(buffer.take((1, 1, 1, 32, 8), torch.zeros(1)))
    assert buffer.take((1, 1, 1, 32, 8), torch.zeros(1, dtype=torch.bfloat16)).keys.dtype == torch.bfloat16


def test_the_cache_has_room_for_the_longest_sequence(model):
    assert KVCache.shape(model, 3, 33) == (2, 3, 2, 64, 8)
