"""Means, spreads and baselines within groups, against plain loops; equal scores are exactly without signal."""

import math

import pytest
import torch

from meshift.algorithms.advantages import group_mean, group_std, has_signal, leave_one_out, returns_to_go
from meshift.batch import Ragged

SIZE = 5


def drawn(num_groups=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_groups * SIZE, generator=generator) * 3
    counted = torch.rand(num_groups * SIZE, generator=generator) < 0.7
    counted[:SIZE] = False  # a group that nothing scored
    counted[SIZE : 2 * SIZE] = torch.tensor([True, *[False] * (SIZE - 1)])  # one with a single score
    return values, counted


def groups(values, counted):
    """For each row: its own value, whether it counts, and the counted values of its group and of the others."""
    for i in range(len(values)):
        block = range(i // SIZE * SIZE, i // SIZE * SIZE + SIZE)
        mine = [float(values[j]) for j in block if counted[j]]
        others = [float(values[j]) for j in block if counted[j] and j != i]
        yield float(values[i]), bool(counted[i]), mine, others


def test_means_and_spreads_are_of_the_counted_rows_of_the_own_group():
    values, counted = drawn()
    mean, std = group_mean(values, counted, SIZE), group_std(values, counted, SIZE)
    for i, (_, _, mine, _) in enumerate(groups(values, counted)):
        expected = sum(mine) / len(mine) if mine else 0.0
        assert float(mean[i]) == pytest.approx(expected)
        spread = math.sqrt(sum((v - expected) ** 2 for v in mine) / (len(mine) - 1)) if len(mine) > 1 else 0.0
        assert float(std[i]) == pytest.approx(spread)


def test_each_row_is_held_against_the_others_and_not_against_itself():
    values, counted = drawn()
    advantage = leave_one_out(values, counted, SIZE)
    for i, (own, counts, _, others) in enumerate(groups(values, counted)):
        expected = own - sum(others) / len(others) if counts and others else 0.0
        assert float(advantage[i]) == pytest.approx(expected)


@pytest.mark.parametrize("score", [0.1, 1e-9, 12345.678, -0.7])
def test_equal_scores_would_pass_rounding_on_as_signal(score):
    """0.1 * 5 / 5 is not 0.1 in binary, and dividing the rest by a tiny spread would blow it up."""
    values, counted = torch.full((3 * SIZE,), score), torch.ones(3 * SIZE, dtype=torch.bool)
    values[-1] += 1.0
    counted[0] = False
    assert has_signal(values, counted, SIZE).tolist() == [False] * 2 * SIZE + [True] * SIZE
    assert group_std(values, counted, SIZE)[: 2 * SIZE].tolist() == [0.0] * 2 * SIZE
    assert leave_one_out(values, counted, SIZE)[: 2 * SIZE].tolist() == [0.0] * 2 * SIZE


def test_a_row_that_does_not_count_gives_its_group_no_signal():
    values = torch.tensor([1.0, 1.0, 1.0, 1.0, 9.0])
    assert not has_signal(values, torch.tensor([True] * 4 + [False]), SIZE).any()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_returns_are_the_discounted_sums_of_what_is_still_to_come(gamma):
    rows = [[1.0, -2.0, 0.5], [4.0], [0.0, 0.0, 1.0, 2.0]]
    found = returns_to_go(Ragged.from_rows(rows, torch.float32), gamma).rows()
    for row, returns in zip(rows, found, strict=True):
        expected = [sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]
        assert returns.tolist() == pytest.approx(expected)
