"""Fingerprints add up over any cut, and see what a plain sum would not."""

import pytest
import torch

from meshift.realloc import fingerprint as subject
from meshift.realloc.fingerprint import fingerprint

WHOLE = (6, 8)


def numbers(dtype=torch.float32, shape=WHOLE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def whole_print(tensor):
    return fingerprint(tensor, tuple((0, size) for size in tensor.shape), tuple(tensor.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(7,), (6, 8), (3, 4, 5)])
def test_disjoint_boxes_add_up_to_the_whole(dtype, shape):
    tensor = numbers(dtype, shape)
    total = torch.zeros(2, dtype=torch.int64)
    for dim in range(len(shape)):
        total.zero_()
        for start, stop in ((0, 1), (1, 3), (3, shape[dim])):
            box = tuple((start, stop) if d == dim else (0, size) for d, size in enumerate(shape))
            total += fingerprint(tensor.narrow(dim, start, stop - start), box, shape)
        assert torch.equal(total, whole_print(tensor))


def test_an_empty_box_adds_nothing():
    assert torch.equal(fingerprint(torch.empty(0, 8), ((6, 6), (0, 8)), WHOLE), torch.zeros(2, dtype=torch.int64))


def test_a_tensor_without_dims_has_a_print_of_its_own():
    one, other = (fingerprint(torch.tensor(value), (), ()) for value in (1.0, 2.0))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[0].copy_(t[1].clone()),
        lambda t: t.copy_(t.flip(0)),
        lambda t: t.copy_(t.flip(1)),
        lambda t: t.copy_(torch.cat([t[3:], t[:3]])),
        lambda t: t[2, 3:4].neg_(),
        lambda t: t[4, 4:5].view(torch.int32).add_(1),
        lambda t: t[0, :2].copy_(t[0, :2].flip(0)),
        lambda t: t[:2, 0].copy_(t[:2, 0].flip(0)),
    ],
)
def test_what_changed_or_changed_places_shows(change):
    tensor = numbers()
    before = whole_print(tensor)
    change(tensor)
    assert not torch.equal(whole_print(tensor), before)


def test_the_same_numbers_at_another_place_are_not_the_same():
    part = numbers()[:3]
    here, there = (fingerprint(part, ((start, start + 3), (0, 8)), WHOLE) for start in (0, 3))
    assert not torch.equal(here, there)


def test_a_shard_of_another_shape_is_a_mistake():
    with pytest.raises(ValueError, match="does not fill"):
        fingerprint(numbers(), ((0, 3), (0, 8)), WHOLE)


@pytest.mark.parametrize("block", [1, 20, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_kernel", [True, False])
def test_the_fast_sums_are_those_of_whole_numbers(monkeypatch, block, dtype, by_kernel):
    monkeypatch.setattr(subject, "BLOCK", block)
    if not by_kernel:
        monkeypatch.setattr(subject, "kernels", lambda: None)
    elif subject.kernels() is None:
        pytest.skip("no kernels on this machine")
    integers = {torch.bfloat16: torch.int16, torch.float32: torch.int32}[dtype]
    bits = torch.cat([numbers(dtype), numbers(dtype).neg()]).view(integers)
    of_rows, of_columns = subject._sums(bits)
    assert of_rows.tolist() == [sum(row) for row in bits.tolist()]
    assert of_columns.tolist() == [sum(column) for column in bits.t().tolist()]


@pytest.mark.parametrize("shape", [(1, 40000), (40000, 1), (40001, 3), (7, 33000)])
@pytest.mark.parametrize("number", [-(2**15), 2**15 - 1])
def test_long_sums_of_extreme_numbers_would_overflow(shape, number):
    bits = torch.full(shape, number, dtype=torch.int16)
    of_rows, of_columns = subject._sums(bits)
    assert of_rows.tolist() == [number * shape[1]] * shape[0]
    assert of_columns.tolist() == [number * shape[0]] * shape[1]
