"""Series against naive computations."""

import math
import re

import numpy as np
import pytest

from meshift.report.axes import linear_axis, log_axis, num_outside
from meshift.report.line_chart import Caption, Line, line_chart
from meshift.report.numbers import duration, log_ticks, short, tick_labels, ticks, whole_ticks
from meshift.report.series import Series

RNG = np.random.default_rng(3)


def test_smoothing_is_the_normally_weighted_mean_of_the_neighbours_and_bridges_gaps():
    values = RNG.normal(size=90).tolist()
    values[7] = values[8] = None
    smooth = Series(range(90), values).smoothed().values
    deviation = 90 / 30
    for i in (0, 7, 40, 89):
        near = [j for j in range(90) if abs(i - j) <= 9 and values[j] is not None]
        weights = [math.exp(-0.5 * ((i - j) / deviation) ** 2) for j in near]
        expected = sum(w * values[j] for w, j in zip(weights, near, strict=True)) / sum(weights)
        assert smooth[i] == pytest.approx(expected)


def test_early_and_late_are_means_of_the_first_and_last_fifth():
    series = Series(range(10), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert (series.early, series.late) == (0.5, 8.5)
    assert Series([1], [4.0]).late == 4.0


def test_noise_alone_is_no_change_and_a_trend_above_it_is():
    wrong = sum(
        change.rose or change.fell
        for change in (Series(range(60), RNG.normal(size=60)).change() for _ in range(200))
    )
    assert wrong <= 6, "three standard errors: about one in 370 by chance, more as noise is estimated"
    assert Series(range(60), RNG.normal(size=60) + np.linspace(0, 4, 60)).change().rose


def test_thinning_keeps_ends_and_every_extreme():
    values = RNG.normal(size=5000)
    values[1234], values[4321] = 50, -50
    thin = Series(range(5000), values).extremes(100)
    assert len(thin) <= 102
    assert thin.values.max() == 50
    assert thin.values.min() == -50
    assert (thin.steps[0], thin.steps[-1]) == (0, 4999)
    even = Series(range(5000), values).at_most(100)
    assert (len(even), even.steps[0], even.steps[-1]) == (100, 0, 4999)


def test_infinite_values_count_as_lost():
    assert Series([1, 2, 3], [1.0, math.inf, None]).lost_steps == [2, 3]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 7.9), (1e-5, 3e-4), (0.98, 1.01), (12000, 98000), (-1e-9, 1e-9), (1e12, 5e12)]
)
def test_ticks_are_round_even_and_inside(low, high):
    found = ticks(low, high)
    assert 3 <= len(found) <= 7
    steps = np.diff(found)
    assert np.allclose(steps, steps[0])
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
    assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in found)
    assert len(set(tick_labels(found))) == len(found), "two ticks with the same label"


def test_step_ticks_are_whole_and_begin_at_the_first_step():
    assert whole_ticks(1, 16) == [1, 5, 10, 15]
    assert whole_ticks(1, 3) == [1, 2, 3]
    assert whole_ticks(4, 4) == [4]
    assert log_ticks(0.8, 900) == [1, 10, 100]


def test_one_outlier_does_not_flatten_a_curve_but_is_counted():
    values = np.concatenate([RNG.normal(size=100), [1000.0]])
    axis = linear_axis(values)
    assert axis.high < 20
    assert num_outside(axis, values) == 1
    few = linear_axis(np.array([0.0, 1.0, 1000.0]))
    assert few.high >= 1000


def test_logarithmic_axis_is_offered_only_to_positive_values_far_apart():
    assert log_axis(np.array([1.0, 2.0])) is None
    assert log_axis(np.array([-1.0, 2000.0])) is None
    axis = log_axis(np.array([1e-3, 10.0]))
    assert axis.at(0.1) == pytest.approx(0.5)


def test_numbers_are_short_and_keep_their_size():
    cases = {0: "0", 1.8895: "1.89", 0.5: "0.5", -0.02: "−0.02", 12.0143: "12", 960: "960", 12345: "12,345"}
    cases |= {2.9e-4: "2.9e−4", 1e9: "1e9"}
    assert {value: short(value) for value in cases} == cases
    assert short(float("nan")) == "–"
    assert [duration(s) for s in (0.4213, 17.8, 290, 11520)] == ["0.421 s", "17.8 s", "4 min 50 s", "3 h 12 min"]


def test_an_axis_of_one_value_would_have_no_length():
    for value in (0.0, 3.0, -3.0):
        axis = linear_axis(np.array([value, value]))
        assert axis.low <= value <= axis.high
        assert axis.low < axis.high


def test_a_curve_over_few_values_is_labelled_where_they_are():
    """Numbers of devices double: round ones between them would be of no plan; what is too near is left out."""

    def labels(steps, **how):
        series = Series(steps, [float(step) for step in steps])
        page = line_chart(Caption(title="t", key="k"), [Line(label="l", series=series, exact=True)], **how)
        found = re.findall(r'class="x"[^>]*>([\d,]+)<', page)
        return found[: len(found) // page.count('role="img"')]

    assert labels([8, 16, 32], at_points=True) == ["8", "16", "32"]
    assert labels([8, 16, 32, 64, 128, 256, 1024], at_points=True) == ["8", "256", "1,024"]
    assert labels([8, 16, 32]) != ["8", "16", "32"]
