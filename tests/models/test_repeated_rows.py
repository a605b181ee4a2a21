"""Rows that are named more than once: their gradients are autograd's, in an order that does not change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import num_threads

from meshift.models.rows import repeat


def named(num_rows, more):
    """Each row once, some once more or often, in no order."""
    rows = torch.cat([torch.arange(num_rows), torch.tensor(more, dtype=torch.int64)])
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))]


def gradients(rows, num_rows, dtype=torch.float32, width=3):
    """Ours and autograd's own."""
    generator = torch.Generator().manual_seed(num_rows)
    x = torch.randn(num_rows, width, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(len(rows), width, generator=generator).to(dtype)
    ours, plain = repeat(x, rows), x[rows]
    assert ours.equal(plain)
    return [torch.autograd.grad(out, x, grad)[0] for out in (ours, plain)], grad


@settings(max_examples=60, deadline=None)
@given(more=st.lists(st.integers(0, 4), max_size=40))
def test_the_gradient_is_that_of_autograd(more):
    (ours, expected), _ = gradients(named(5, more), 5)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_no_rows_have_no_gradient():
    (ours, _), _ = gradients(named(0, []), 0)
    assert ours.shape == (0, 3)


def test_copies_are_added_in_the_order_in_which_they_are_named():
    rows = named(7, [0, 3, 3, 6, *[2] * 50])
    (ours, _), grad = gradients(rows, 7)
    for row in range(7):
        first, *later = grad[rows == row]
        for other in later:
            first = first + other
        assert ours[row].equal(first)


def test_half_precision_is_rounded_once():
    rows = named(7, [0, 3, 3, 6, *[2] * 50])
    (ours, _), grad = gradients(rows, 7, torch.bfloat16)
    expected = torch.stack([grad[rows == row].double().sum(0) for row in range(7)])
    torch.testing.assert_close(ours.double(), expected, atol=1e-6, rtol=2**-8)


def test_bits_repeat_on_several_threads():
    rows = named(300, [7, 8, 9] * 100)
    with num_threads(2):
        found = [gradients(rows, 300, width=256)[0][0] for _ in range(10)]
    assert all(each.equal(found[0]) for each in found[1:])


@pytest.mark.parametrize("rows", [[0, 2], [0, 1, 2, 3]])
def test_a_row_that_nobody_names_or_that_is_not_there_is_refused(rows):
    with pytest.raises(ValueError, match="each of 3 rows must be named"):
        repeat(torch.zeros(3, 2), torch.tensor(rows))
