"""Numbers of a plan read as numbers."""

from meshift.planner.figures import figure


def test_a_long_step_would_be_told_as_a_power_of_ten():
    assert [figure(n) for n in (0.0457, 9.154, 111.4, 999.4)] == ["0.0457", "9.15", "111", "999"]
    assert [figure(n) for n in (999.6, 9184.3, 1234567.0)] == ["1,000", "9,184", "1,234,567"]
    assert [figure(16384.0, 4), figure(128.25, 4), figure(120.0, 2)] == ["16,384", "128.2", "120"]
    assert figure(0.0) == "0"
