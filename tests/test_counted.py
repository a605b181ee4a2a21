"""Long work is told to whoever asked to hear of it, and short work to nobody."""

import pytest

from meshift.counted import Count, counted, heard_by


class Clock:
    now = 7.0

    def __call__(self):
        return self.now


def heard(num_items, seconds, total=lambda: None):
    clock, found = Clock(), []

    def slowly():
        for item in range(num_items):
            clock.now += seconds
            yield item

    with heard_by(lambda *told: found.append(told)):
        assert list(counted(slowly(), "rows", total, clock)) == list(range(num_items))
    return found


def test_short_work_would_flash_by():
    assert heard(100, 0.01, pytest.fail) == [], "nor is it asked how much there is"


def test_long_work_is_told_now_and_then_and_at_its_end():
    asked = []

    def total():
        asked.append(True)
        return 40

    assert heard(40, 0.15, total) == [
        ("rows", n, 40) for n in (14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40)
    ]
    assert len(asked) == 1


def test_work_that_ends_before_its_count_says_is_done_all_the_same():
    assert heard(3, 1.0, lambda: 9) == [("rows", 2, 9), ("rows", 3, 9), ("rows", 3, 3)]
    assert heard(3, 1.0)[0] == ("rows", 2, None)


def test_nobody_has_to_listen_and_who_listened_before_does_again():
    assert list(counted("ab", "letters", pytest.fail)) == ["a", "b"]
    clock, outer, inner = Clock(), [], []
    with heard_by(lambda *told: outer.append(told)):
        with heard_by(lambda *told: inner.append(told)):
            count = Count("inner", lambda: 2, clock)
        clock.now += 3
        count.to(1)
        count = Count("outer", lambda: 2, clock)
        clock.now += 3
        count.to(2)
    assert (inner, outer) == ([("inner", 1, 2)], [("outer", 2, 2)])
