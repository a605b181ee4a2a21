"""Estimates against enumeration of every choice, tables of published quantiles, and coverage in simulation."""

import math
import random
from fractions import Fraction
from itertools import combinations, pairwise, permutations
from statistics import fmean

import pytest

from meshift.evaluation.estimators import (
    Sample,
    clustered_n_at_k,
    filtered_n_at_k,
    mean,
    pass_at_k,
    share,
    student_quantile,
    submissions,
)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_correct_one(num_samples):
    for num_correct in range(num_samples + 1):
        marks = [i < num_correct for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            choices = list(combinations(marks, k))
            expected = sum(map(any, choices)) / len(choices)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(100_000, 3, 1000), (10_000, 5000, 1), (2000, 1, 1999), (1000, 0, 10)])
def test_pass_at_k_stays_exact_where_binomials_are_huge(n, c, k):
    expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert pass_at_k(n, c, k) == pytest.approx(float(expected), rel=1e-9)


def test_pass_at_k_is_unbiased():
    """Averaged over how many of 6 samples are correct at a rate of 0.3, it is the chance for 3 samples."""
    rate, n, k = 0.3, 6, 3
    weights = [math.comb(n, c) * rate**c * (1 - rate) ** (n - c) for c in range(n + 1)]
    average = sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights))
    assert average == pytest.approx(1 - (1 - rate) ** k, rel=1e-12)


def test_more_samples_than_there_are_cannot_be_drawn():
    with pytest.raises(ValueError, match="pass@5 of 4 samples"):
        pass_at_k(4, 1, 5)


def every_filtered_outcome(samples, n, k):
    """The chance by going through each choice of k, and each choice of n among those that pass."""
    solved = []
    for chosen in combinations(samples, k):
        kept = [correct for passes, correct in chosen if passes]
        choices = list(combinations(kept, min(n, len(kept))))
        solved.append(fmean(any(choice) for choice in choices))
    return fmean(solved)


@pytest.mark.parametrize(("n", "k"), [(1, 3), (2, 4), (3, 7), (5, 6), (1, 1)])
def test_n_at_k_with_filtering_is_that_of_every_choice(n, k):
    samples = [
        (True, True),
        (True, False),
        (True, False),
        (True, True),
        (False, False),
        (False, False),
        (True, False),
    ]
    expected = every_filtered_outcome(samples, n, k)
    kept = [correct for passes, correct in samples if passes]
    assert filtered_n_at_k(7, len(kept), sum(kept), n=n, k=k) == pytest.approx(expected, abs=1e-9)


def test_n_at_k_without_a_filter_and_with_all_submitted_is_pass_at_k():
    assert filtered_n_at_k(20, 20, 3, n=5, k=5) == pytest.approx(pass_at_k(20, 3, 5))
    assert filtered_n_at_k(20, 20, 3, n=2, k=11) == pytest.approx(pass_at_k(20, 3, 2))
    assert filtered_n_at_k(1000, 0, 0, n=10, k=1000) == 0.0


def submitted_in_turn(order, n):
    """Submissions one by one: the plain reading of the protocol. `order` has the clusters, largest first."""
    left = [list(cluster) for cluster in order]
    sent = []
    while len(sent) < n and any(left):
        for cluster in left:
            if cluster and len(sent) < n:
                sent.append(cluster.pop(0))
    return sent


def every_clustered_outcome(samples, n, k):
    """By every choice of k, every order of clusters that is sorted by size, and every order within clusters."""
    outcomes = []
    for chosen in combinations(samples, k):
        names = sorted({s.behaviour for s in chosen if s.kept})
        clusters = [[s.correct for s in chosen if s.kept and s.behaviour == name] for name in names]
        tried = []
        for order in permutations(clusters):
            if any(len(a) < len(b) for a, b in pairwise(order)):
                continue
            for one in inner_orders(order):
                tried.append(any(submitted_in_turn(one, n)))
        outcomes.append(fmean(tried) if tried else 0.0)
    return fmean(outcomes)


def inner_orders(clusters):
    if not clusters:
        return [()]
    rest = inner_orders(clusters[1:])
    return [(first, *others) for first in permutations(clusters[0]) for others in rest]


@pytest.mark.parametrize(("n", "k"), [(1, 5), (2, 5), (3, 5), (2, 4), (1, 3)])
def test_n_at_k_with_clusters_is_that_of_every_choice(n, k):
    marks = [("a", True), ("a", False), ("b", False), ("b", False), ("c", True)]
    samples = [Sample(kept=True, correct=c, behaviour=b) for b, c in marks]
    expected = every_clustered_outcome(samples, n, k)
    found = clustered_n_at_k(samples, n=n, k=k, num_draws=4000, seed=1)
    assert found == pytest.approx(expected, abs=0.03)


def test_clusters_help_where_right_programs_agree_and_wrong_ones_do_not():
    right = [Sample(kept=True, correct=True, behaviour="42")] * 4
    wrong = [Sample(kept=True, correct=False, behaviour=i) for i in range(16)]
    assert clustered_n_at_k([*right, *wrong], n=1, k=20) == 1.0
    assert filtered_n_at_k(20, 20, 4, n=1, k=20) == pytest.approx(0.2)


def test_samples_that_fail_the_public_tests_are_never_submitted():
    samples = [Sample(kept=False, correct=True, behaviour=0), Sample(kept=True, correct=False, behaviour=0)]
    assert clustered_n_at_k(samples, n=2, k=2) == 0.0


def test_submissions_go_around_the_clusters():
    assert submissions([3, 1, 1], 4) == [2, 1, 1]
    assert submissions([3, 1, 1], 10) == [3, 1, 1]
    assert submissions([2, 2], 1) == [1, 0]
    assert submissions([], 5) == []


@pytest.mark.parametrize(
    ("degrees", "table"),
    [
        (1, 12.706),
        (2, 4.303),
        (3, 3.182),
        (4, 2.776),
        (5, 2.571),
        (9, 2.262),
        (10, 2.228),
        (30, 2.042),
        (120, 1.980),
    ],
)
def test_student_quantiles_are_those_of_the_tables(degrees, table):
    assert student_quantile(degrees) == pytest.approx(table, rel=2e-3)


def test_wilson_intervals_are_those_of_the_literature():
    """Newcombe 1998, table I: 81 of 263 gives .2553 to .3662, 15 of 148 .0624 to .1605, 0 of 20 0 to .1611."""
    for hits, num, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)]:
        found = share([1.0] * hits + [0.0] * (num - hits))
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)
        assert found.value == pytest.approx(hits / num)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    draws = random.Random(0)
    hits = {"share": 0, "mean": 0}
    for _ in range(1000):
        found = share([float(draws.random() < 0.3) for _ in range(40)])
        hits["share"] += found.low <= 0.3 <= found.high
        found = mean([draws.gauss(2.0, 3.0) for _ in range(6)])
        hits["mean"] += found.low <= 2.0 <= found.high
    assert 930 <= hits["mean"] <= 970
    assert 930 <= hits["share"] <= 975


def test_one_value_has_a_mean_and_no_interval():
    found = mean([1.5])
    assert (found.value, found.low, found.high) == (1.5, None, None)
    with pytest.raises(ValueError, match="one or more values"):
        mean([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        share([1.2])
