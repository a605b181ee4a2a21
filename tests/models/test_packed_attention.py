"""PackedAttention against its plain twin, and how its buckets are filled."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import num_threads

from meshift.models import continued
from meshift.models.attention import PackedAttention, PlainAttention, packed_positions
from meshift.models.masked_attention import AttentionLayer

LAYER = AttentionLayer(index=0, scale=0.31)


def inputs(num_rows, heads=4, kv_heads=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num_rows)
    shapes = [(num_rows, heads, 8), (num_rows, kv_heads, 8), (num_rows, kv_heads, 8)]
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    window=st.sampled_from([None, 1, 4, 30, 100]),
    softcap=st.sampled_from([None, 0.6]),
    block=st.sampled_from([5, 512]),
)
def test_values_and_gradients_are_those_of_the_plain_twin(lengths, heads, window, softcap, block):
    layer = AttentionLayer(index=0, scale=0.31, window=window, softcap=softcap)
    rows = inputs(sum(lengths), *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meshift.models.attention.BLOCK", block)
        packed, plain = (kind(lengths)(layer, *rows) for kind in (PackedAttention, PlainAttention))
        _compare(packed, plain, rows)


def _compare(packed, plain, rows):
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    if not len(packed):
        return
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    grads = [torch.autograd.grad((out * weights).sum(), rows) for out in (packed, plain)]
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [20, 600])
@pytest.mark.parametrize("window", [None, 15])
@pytest.mark.parametrize("softcap", [None, 0.6])
def test_half_precision_stays_close_to_the_plain_twin_on_either_side_of_the_upcast(length, window, softcap):
    layer = AttentionLayer(index=0, scale=0.31, window=window, softcap=softcap)
    rows = inputs(length + 3, dtype=torch.bfloat16)
    packed, plain = (kind([length, 3])(layer, *rows) for kind in (PackedAttention, PlainAttention))
    assert packed.dtype == torch.bfloat16
    torch.testing.assert_close(packed, plain, atol=0.02, rtol=0.02)


@pytest.mark.parametrize(("window", "softcap"), [(64, None), (None, 0.6), (64, 0.6)])
def test_no_matrix_of_all_rows_by_all_rows_is_made_or_kept(window, softcap):
    length, sizes = 1500, {}
    layer = AttentionLayer(index=0, scale=0.31, window=window, softcap=softcap)
    rows = inputs(length, heads=1, kv_heads=1)

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        PackedAttention([length])(layer, *rows)
    assert sum(sizes.values()) < length * length / 2


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 3000), max_size=60))
def test_padding_is_bounded_and_each_sequence_is_in_one_bucket(lengths):
    buckets = PackedAttention(lengths).buckets
    members = sorted(i for bucket, _ in buckets for i in bucket)
    assert members == [i for i, n in enumerate(lengths) if n]
    num_padded = sum(len(bucket) * longest for bucket, longest in buckets)
    assert num_padded * 0.75 <= sum(lengths)
    assert all(longest == max(lengths[i] for i in bucket) for bucket, longest in buckets)


def test_one_long_sequence_is_not_what_the_short_ones_are_padded_to():
    assert [longest for _, longest in PackedAttention([2000, *[20] * 50]).buckets] == [2000, 20]


def test_positions_count_from_zero_in_each_sequence():
    assert packed_positions([3, 0, 1, 2]).tolist() == [0, 1, 2, 0, 0, 1]
    assert packed_positions([]).tolist() == []


@pytest.mark.parametrize("kind", [PackedAttention, PlainAttention])
def test_rows_that_do_not_add_up_are_refused(kind):
    with pytest.raises(ValueError, match="add up to 5 rows, but 6"):
        kind([2, 3])(LAYER, *inputs(6))


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match="negative length"):
        PackedAttention([3, -1])


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 9), st.lists(st.integers(0, 12), max_size=3)), min_size=1, max_size=4
    ),
    window=st.sampled_from([None, 1, 4]),
    softcap=st.sampled_from([None, 0.6]),
    most=st.sampled_from([(256, 64), (5, 1), (5, 8)]),
)
def test_pieces_are_as_the_whole_sequences_of_the_plain_twin(groups, window, softcap, most):
    layer = AttentionLayer(index=0, scale=0.31, window=window, softcap=softcap)
    lengths, before, whole, own, start = [], [], [], [], 0
    sequences = []
    for shared, rests in groups:
        first = start
        for number, length in enumerate([shared, *rests]):
            common = list(range(first, first + shared)) if number else []
            before.append(len(lengths) - number)
            lengths.append(length)
            own += range(len(whole) + len(common), len(whole) + len(common) + length)
            whole += [*common, *range(start, start + length)]
            sequences.append(len(common) + length)
            start += length
    rows = inputs(start)
    picked = [row[torch.tensor(whole, dtype=torch.int64)] for row in rows]
    plain = PlainAttention(sequences)(layer, *picked)[torch.tensor(own, dtype=torch.int64)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(continued, "BLOCK_ROWS", most[0])
        patch.setattr(continued, "LEAST_ROWS", most[1])
        packed = PackedAttention(lengths, before)(layer, *rows)
        _compare(packed, plain, rows)


MANY = [64] + [7, 32, 70] * 4
"""Rows of a beginning and of what continues it."""


def many_pieces():
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(sum(MANY), heads, 64, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    return PackedAttention(MANY, [0] * len(MANY)), rows, torch.randn(sum(MANY), 4, 64, generator=generator)


@pytest.mark.parametrize("softcap", [None, 0.6])
def test_gradients_of_shared_rows_repeat_bit_for_bit_on_several_threads(softcap):
    attention, rows, grad = many_pieces()
    layer = AttentionLayer(index=0, scale=0.1, softcap=softcap)
    found = []
    with num_threads(2):
        for _ in range(10):
            found.append(torch.autograd.grad(attention(layer, *rows), rows, grad))
    assert all(one.equal(other) for each in found[1:] for one, other in zip(each, found[0], strict=True))


def test_gradients_of_shared_rows_are_those_of_autograd_for_whole_sequences():
    attention, rows, grad = many_pieces()
    layer = AttentionLayer(index=0, scale=0.1)
    pieces = torch.arange(sum(MANY)).split(MANY)
    whole = torch.cat([pieces[0], *(torch.cat([pieces[0], piece]) for piece in pieces[1:])])
    own = torch.cat([torch.ones(64), *(torch.arange(64 + n) >= 64 for n in MANY[1:])]).bool()
    lengths = [64, *(64 + n for n in MANY[1:])]
    spread = PackedAttention(lengths)(layer, *(x[whole] for x in rows))[own]
    ours, expected = (torch.autograd.grad(out, rows, grad) for out in (attention(layer, *rows), spread))
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6 * other.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("softcap", [None, 0.6])
def test_nothing_of_the_length_of_whole_sequences_is_kept(window, softcap):
    """16 pieces of 20 rows continue one of 500: 820 rows, while the sequences have 8320."""
    lengths, kept = [500, *[20] * 16], {}
    rows = inputs(sum(lengths))

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    layer = AttentionLayer(index=0, scale=0.31, window=window, softcap=softcap)

    def size_of(attention, parts):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention(layer, *parts)
        return sum(kept.values())

    alone = size_of(PackedAttention([500]), [row[:500] for row in rows])
    together = size_of(PackedAttention(lengths, [0] * 17), rows)
    assert together < alone + 2 * sum(row.numel() for row in rows)
