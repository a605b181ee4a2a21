"""Copies of many boxes by one table: whatever their shapes, all numbers, none beside them, and as torch does."""

import pytest
import torch

from meshift.realloc import copies as copies_module
from meshift.realloc.copies import Copies, place_of


def boxes(dtype, seed):
    """Parts of matrices and vectors, some of whole rows, some empty, one longer than an entry of the table."""
    draw = torch.Generator().manual_seed(seed)
    shapes = [((7, 5), (slice(1, 6), slice(2, 5))), ((4, 6), (slice(None), slice(None))), ((9,), (slice(2, 7),))]
    shapes += [((3, 4), (slice(1, 1), slice(None))), ((300, 64), (slice(0, 300), slice(3, 61))), ((), ())]
    for shape, slices in shapes:
        yield torch.randn(shape, generator=draw).to(dtype), slices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1 << 20, 512, 3])
def test_boxes_arrive_whole_and_alone(dtype, chunk, monkeypatch):
    monkeypatch.setattr(copies_module, "CHUNK", chunk)
    wholes = list(boxes(dtype, 0))
    sources = [whole[slices].clone() for whole, slices in boxes(dtype, 1)]
    expected = [whole.clone() for whole, _ in wholes]
    for whole, (_, slices), source in zip(expected, wholes, sources, strict=True):
        whole[slices] = source
    copies, targets = Copies(), [whole for whole, _ in wholes]
    place = place_of([*targets, *sources])
    for again in (False, True):  # the second time by the table that was kept
        assert copies.again(place, targets) == again
        if not again:
            pairs = [(whole[slices], source) for (whole, slices), source in zip(wholes, sources, strict=True)]
            copies.run(pairs, place)
        assert all(torch.equal(whole, other) for (whole, _), other in zip(wholes, expected, strict=True))
        for (whole, _), source in zip(wholes, sources, strict=True):
            source.neg_()
            whole.neg_()
        expected = [-whole for whole in expected]
        for whole, (_, slices), source in zip(expected, wholes, sources, strict=True):
            whole[slices] = source


def test_tensors_that_moved_would_be_copied_from_where_they_were():
    copies, target = Copies(), torch.zeros(3, 4)
    kept = [torch.full((3, 4), value) for value in (1.0, 2.0)]
    for source in kept:
        place = place_of([target, source])
        assert not copies.again(place, [target])
        copies.run([(target[:, 1:3], source[:, 1:3])], place)
        assert target[:, 1:3].equal(source[:, 1:3])
        assert not target[:, 0].any()
    assert place_of([source[:, 1:]]) != place_of([source])
    assert place_of([torch.zeros(4, 4).t()[:1]]) != place_of([torch.zeros(4, 4)[:1]])


def test_another_type_or_stride_goes_by_torch():
    target, source = torch.zeros(3, 4), torch.arange(12.0).view(4, 3)
    Copies().run([(target, source.t()), (torch.zeros(2), torch.ones(2, dtype=torch.bfloat16))])
    assert torch.equal(target, source.t())


def test_a_copy_counts_as_a_change():
    target, source, copies = torch.zeros(3), torch.ones(3), Copies()
    place = place_of([target, source])
    for again in (False, True):
        before = target._version
        if not copies.again(place, [target]):
            assert not again
            copies.run([(target, source)], place)
        assert target._version > before


def test_a_place_that_was_copied_by_torch_is_copied_by_torch_again():
    """Also where another one was copied by a table before."""
    copies, target, source = Copies(), torch.zeros(3, 3), torch.arange(9.0).view(3, 3)
    copies.run([(target, source)], place_of([target, source]))
    place = place_of([target, source.t()])
    copies.run([(target, source.t())], place)
    assert target.equal(source.t())
    assert not copies.again(place, [target])
