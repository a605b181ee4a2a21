"""How far a command is: lines now and then, or a bar; what is left is told from what was counted here."""

import io
import itertools

from rich.console import Console

from meshift.cli.counting import Counting


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


def counted(counts, *, terminal=False, seconds=2.0, work=()):
    output, clock = io.StringIO(), Clock()
    with Counting(Console(file=output, force_terminal=terminal, width=120), clock) as counting:
        for count, measured in itertools.zip_longest(counts, work):
            counting(*count, work=measured)
            clock.now += seconds
    return output.getvalue()


def test_a_pipe_gets_a_line_at_most_every_five_seconds_and_the_last_one():
    lines = counted([("programs", done, 10) for done in range(11)]).splitlines()
    assert lines == [
        "programs: 3/10  elapsed 0:00:06  eta 0:00:14",
        "programs: 6/10  elapsed 0:00:12  eta 0:00:08",
        "programs: 9/10  elapsed 0:00:18  eta 0:00:02",
        "programs: 10/10  elapsed 0:00:20  eta 0:00:00",
    ]


def test_what_was_done_before_says_nothing_of_how_long_the_rest_takes():
    lines = counted([("completions", done, 100) for done in (90, 91, 92, 93)]).splitlines()
    assert lines == ["completions: 93/100  elapsed 0:00:06  eta 0:00:14"]
    assert counted([("completions", 100, 100)]).splitlines() == [
        "completions: 100/100  elapsed 0:00:00  eta 0:00:00"
    ]


def test_another_kind_begins_anew():
    counts = [("completions", 0, 2), ("completions", 2, 2), ("programs", 1, 4), ("programs", 4, 4)]
    lines = counted(counts, seconds=1.0).splitlines()
    assert lines == [
        "completions: 2/2  elapsed 0:00:01  eta 0:00:00",
        "programs: 4/4  elapsed 0:00:01  eta 0:00:00",
    ]


def test_what_failed_would_look_done():
    counts = [("answers", 1, 3, 0), ("answers", 2, 3, 1), ("answers", 3, 3, 2), ("programs", 1, 1)]
    lines = counted(counts, seconds=1.0).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["answers: 3/3, 2 failed", "programs: 1/1"]
    assert "answers, 2 failed" in counted(counts[:3], terminal=True)


def test_a_terminal_gets_a_bar_and_a_pipe_no_control_characters():
    text = counted([("programs", done, 3) for done in range(4)], terminal=True)
    assert "3/3" in text
    assert "\x1b" in text
    assert "\x1b" not in counted([("programs", done, 3) for done in range(4)])


def test_one_long_completion_that_is_left_is_told_by_its_own_steps():
    counts = [("completions", 199, 200)] * 12
    work = [(1000 + 10 * i, 500 - 10 * i) for i in range(12)]
    lines = counted([("completions", 0, 200), *counts], work=[None, *work], seconds=2.0).splitlines()
    assert [line.split("eta ")[1] for line in lines] == ["0:01:36", "0:01:30", "0:01:24", "0:01:18"]


def test_the_pace_is_that_of_now():
    """Ten steps take ten seconds at first, and then one second each tenth."""
    counts = [("completions", 1, 9)] * 31
    work = [(i, 100) for i in range(11)] + [(10 + 10 * i, 100) for i in range(1, 21)]
    lines = counted(counts, work=work, seconds=1.0).splitlines()
    assert lines[0].endswith("eta 0:01:40")
    assert lines[-1].endswith("eta 0:00:10")


def test_how_many_there_are_need_not_be_known():
    lines = counted([("rows", done, None) for done in (10, 20, 30, 40)] + [("rows", 40, 40)]).splitlines()
    assert lines == ["rows: 40  elapsed 0:00:06  eta ?", "rows: 40/40  elapsed 0:00:08  eta 0:00:00"]
    assert "40/40" in counted([("rows", 10, None), ("rows", 40, 40)], terminal=True)


def test_a_bar_that_was_taken_away_would_not_come_back():
    output = io.StringIO()
    with Counting(Console(file=output, force_terminal=True, width=120)) as counting:
        counting("rows", 1, 3)
        counting.stop()
        before = len(output.getvalue())
        counting("tensors", 2, 3)
        counting.stop()
    assert "tensors" in output.getvalue()[before:]
    assert "rows" not in output.getvalue()[before:]
