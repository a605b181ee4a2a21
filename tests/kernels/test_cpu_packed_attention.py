"""Causal attention of packed sequences and its gradients, against torch's in fp32."""

import pytest
import torch
from kernel_twins import causal_attention, near, random_numbers
from threads import num_threads

from meshift.kernels.cpu import Sequences

SCALE = 0.2
RAGGED = [5, 0, 64, 1, 33, 65, 0]


def sequences_of(lengths, window=0):
    return Sequences(
        starts=torch.tensor([0, *lengths]).cumsum(0), before=torch.arange(len(lengths)), scale=SCALE, window=window
    )


def heads_of(num_rows, heads=4, kv_heads=2, dim=32, *, scale=1.0):
    """Query, key and value as parts of one matrix, as a product gives them."""
    whole = random_numbers(num_rows, (heads + 2 * kv_heads) * dim, scale=scale)
    parts = whole.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
    return [part.unflatten(1, (-1, dim)) for part in parts]


def all_of(cpu, parts, sequences, grad):
    """The result and the gradients of query, key and value."""
    out, lse = cpu.packed_attention(parts, sequences, keep=True)
    return [out, *cpu.packed_attention_backward(parts, sequences, out, lse, grad)]


def expected_of(parts, lengths, window, grad):
    wide = [part.float().requires_grad_() for part in parts]
    out = causal_attention(wide, lengths, scale=SCALE, window=window)
    return [out.detach(), *torch.autograd.grad(out, wide, grad.float())]


def hold(cpu, parts, lengths, window=0):
    grad = random_numbers(*parts[0].shape, seed=3)
    found = all_of(cpu, parts, sequences_of(lengths, window), grad)
    expected = expected_of(parts, lengths, window, grad)
    near(found[0], expected[0], within=2**-7)
    for one, true in zip(found[1:], expected[1:], strict=True):
        assert one.shape == true.shape
        assert one.dtype == torch.bfloat16
        near(one, true, within=2**-6)


@pytest.mark.parametrize("window", [0, 1, 5, 64, 100])
@pytest.mark.parametrize("lengths", [[1], [2], RAGGED, [300, 7, 0, 1], [257], [513]], ids=str)
def test_a_length_or_a_window_would_not_be_served(cpu, lengths, window):
    hold(cpu, heads_of(sum(lengths)), lengths, window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (16, 1)])
@pytest.mark.parametrize("dim", [32, 64, 96, 256])
def test_a_size_or_a_group_of_heads_would_not_be_served(cpu, heads, kv_heads, dim):
    hold(cpu, heads_of(79, heads, kv_heads, dim, scale=(32 / dim) ** 0.5), [70, 9])


def test_what_is_kept_for_gradients_would_change_the_result(cpu):
    parts = heads_of(sum(RAGGED))
    kept = cpu.packed_attention(parts, sequences_of(RAGGED), keep=True)
    bare = cpu.packed_attention(parts, sequences_of(RAGGED), keep=False)
    assert [len(kept), len(bare)] == [2, 1]
    assert bare[0].equal(kept[0])


def test_whole_tensors_would_be_read_otherwise_than_parts_of_one(cpu):
    parts, grad = heads_of(sum(RAGGED)), random_numbers(sum(RAGGED), 4, 32)
    ours = all_of(cpu, parts, sequences_of(RAGGED), grad)
    others = all_of(cpu, [part.contiguous() for part in parts], sequences_of(RAGGED), grad)
    assert all(one.equal(other) for one, other in zip(ours, others, strict=True))


@pytest.mark.parametrize("length", [1, 40, 65, 300])
def test_a_sequences_bits_would_depend_on_its_company_or_the_threads(cpu, length):
    before, behind = 37, 70
    parts = heads_of(before + length + behind)
    grad = random_numbers(len(parts[0]), 4, 32)
    mine = slice(before, before + length)
    alone = all_of(cpu, [part[mine] for part in parts], sequences_of([length]), grad[mine].clone())
    for part in (*parts, grad):  # nothing of a neighbour's may be read, not even times zero
        part[:before] = torch.nan
        part[before + length :] = torch.nan
    for threads in (1, 2):
        with num_threads(threads):
            found = all_of(cpu, parts, sequences_of([before, length, behind]), grad)
        assert all(one[mine].equal(other) for one, other in zip(found, alone, strict=True))


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("changed", [0, 63, 64, 200, 256, 299])
def test_a_later_row_would_be_seen_or_one_before_the_window(cpu, changed, window):
    parts = heads_of(300)
    before = cpu.packed_attention(parts, sequences_of([300], window), keep=False)[0]
    for part in parts[1:]:
        part[changed] += 3
    after = cpu.packed_attention(parts, sequences_of([300], window), keep=False)[0]
    same = (after == before).flatten(1).all(dim=1)
    last = changed + window if window else 300
    assert same[:changed].all()
    assert same[last:].all()
    assert not same[changed:last].any()


@pytest.mark.parametrize("scale", [20.0, 1e3])
def test_large_scores_would_overflow(cpu, scale):
    parts = heads_of(300, scale=scale)
    grad = random_numbers(300, 4, 32)
    found = all_of(cpu, parts, sequences_of([300]), grad)
    assert all(part.isfinite().all() for part in found)
    near(found[0], expected_of(parts, [300], 0, grad)[0], within=2**-6)


def test_a_number_that_is_none_would_be_hidden(cpu):
    parts = heads_of(20)
    parts[1][12, 0, 5] = torch.nan
    found = cpu.packed_attention(parts, sequences_of([20]), keep=False)[0]
    assert found[12:, :2].isnan().all()
    assert not found[:, 2:].isnan().any()


def test_no_rows_would_not_be_served(cpu):
    parts = heads_of(0)
    found = all_of(cpu, parts, sequences_of([0, 0]), random_numbers(0, 4, 32))
    assert [len(part) for part in found] == [0, 0, 0, 0]


# Pieces: how many rows each has, and which it continues. Groups of three, one and none that continue the first.
PIECES = [(40, 0), (7, 0), (0, 0), (65, 0), (9, 4), (0, 5), (5, 5), (130, 7), (1, 7)]


def pieces_of(window):
    lengths, before = zip(*PIECES, strict=True)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    return Sequences(starts=starts, before=torch.tensor(before), scale=SCALE, window=window)


def whole_rows():
    """For every piece the rows of what it continues and its own, one after another; and where its own lie."""
    starts = pieces_of(0).starts.tolist()
    rows, own, lengths = [], [], []
    for piece, (length, before) in enumerate(PIECES):
        shared = list(range(starts[before], starts[before + 1])) if before != piece else []
        own += range(len(rows) + len(shared), len(rows) + len(shared) + length)
        rows += [*shared, *range(starts[piece], starts[piece + 1])]
        lengths.append(len(shared) + length)
    return torch.tensor(rows), torch.tensor(own), lengths


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("window", [0, 1, 50])
def test_what_sequences_share_would_be_other_rows(cpu, window, threads):
    rows, own, lengths = whole_rows()
    parts = heads_of(sum(length for length, _ in PIECES), 6, 2, 64)
    grad = random_numbers(*parts[0].shape, seed=3)
    with num_threads(threads):
        found = all_of(cpu, parts, pieces_of(window), grad)
    wide = [part.float().requires_grad_() for part in parts]
    out = causal_attention([part[rows] for part in wide], lengths, scale=SCALE, window=window)[own]
    expected = [out.detach(), *torch.autograd.grad(out, wide, grad.float())]
    near(found[0], expected[0], within=2**-7)
    for one, true in zip(found[1:], expected[1:], strict=True):
        near(one, true, within=2**-6)


def test_a_shared_row_would_have_other_bits(cpu):
    rows, own, lengths = whole_rows()
    parts = heads_of(sum(length for length, _ in PIECES), 6, 2, 64)
    shared = cpu.packed_attention(parts, pieces_of(0), keep=True)
    whole = cpu.packed_attention([part[rows] for part in parts], sequences_of(lengths), keep=True)
    for one, other in zip(shared, whole, strict=True):
        assert one.equal(other[own])


def test_threads_would_change_the_gradients_of_shared_rows(cpu):
    parts = heads_of(sum(length for length, _ in PIECES), 6, 2, 64)
    grad = random_numbers(*parts[0].shape, seed=3)
    found = []
    for threads in (1, 2):
        with num_threads(threads):
            found.append(all_of(cpu, parts, pieces_of(0), grad))
    for one, other in zip(*found, strict=True):
        assert one.equal(other)


def test_gradients_of_shared_rows_that_are_added_in_turns_would_be_others(cpu):
    """Twelve pieces give 4096 rows more gradients than the kernel keeps at once. Their window sees the last 64."""
    shared, seen, own, window = 4096, 200, 3, 64
    lengths = [shared, *[own] * 12]
    parts = heads_of(sum(lengths), 2, 2, 256, scale=0.5)
    grad = random_numbers(*parts[0].shape, seed=3)
    pieces = Sequences(
        starts=torch.tensor([0, *lengths]).cumsum(0),
        before=torch.zeros(13, dtype=torch.int64),
        scale=SCALE,
        window=window,
    )
    found = []
    for threads in (1, 2):
        with num_threads(threads):
            found.append(all_of(cpu, parts, pieces, grad))
    assert all(one.equal(other) for one, other in zip(*found, strict=True))

    wide = [part[shared - seen :].float().requires_grad_() for part in parts]
    common, starts = list(range(seen)), range(seen, seen + 12 * own, own)
    rows = torch.tensor([*common, *(row for at in starts for row in (*common, *range(at, at + own)))])
    out = causal_attention([part[rows] for part in wide], [seen, *[seen + own] * 12], scale=SCALE, window=window)
    places = [torch.arange(seen), *(torch.arange(own) + 2 * seen + (seen + own) * i for i in range(12))]
    out = out[torch.cat(places)]
    true = torch.autograd.grad(out, wide, grad[shared - seen :].float())
    for one, expected in zip(found[0][1:], true, strict=True):  # the first of these rows see others before them
        near(one[shared - seen + window :], expected[window:], within=2**-6)
