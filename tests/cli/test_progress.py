"""What the terminal shows: a bar with the running call where there is one, else a line now and then."""

import io

import pytest
from rich.console import Console

from meshift.cli.progress import RichObserver
from meshift.runtime.observer import Observer, SilentObserver


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def watch(*, terminal, seconds_per_step, num_steps=20):
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=terminal, width=160)
    with RichObserver(console, clock) as observer:
        observer.on_message("12 prompts [left] out")
        observer.on_start(num_steps, "PPO")
        for step in range(num_steps):
            observer.on_call(step, "rollout")
            clock.now += seconds_per_step
            observer.on_step(step, {"reward/mean": step / 4, "objective/kl": 1.5, "actor/pg_loss": 7.0})
        observer.on_finish()
    assert observer.num_done == num_steps
    return output.getvalue()


def test_a_pipe_gets_plain_lines_at_most_every_five_seconds():
    lines = watch(terminal=False, seconds_per_step=1.0).splitlines()
    assert lines[:2] == ["note: 12 prompts [left] out", "PPO: 20 steps"]
    assert [line.split()[1] for line in lines[2:]] == ["1/20", "6/20", "11/20", "16/20", "20/20"]
    assert lines[3] == "step 6/20  elapsed 0:00:06  eta 0:00:14  reward 1.25  kl 1.5"


def test_a_pipe_gets_every_slow_step():
    lines = watch(terminal=False, seconds_per_step=400.0, num_steps=3).splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["1/3", "2/3", "3/3"]
    assert "elapsed 0:13:20  eta 0:06:40" in lines[3]


def test_rounding_before_the_first_update_would_be_shown_as_a_kl():
    output = io.StringIO()
    with RichObserver(Console(file=output, width=160), Clock()) as observer:
        observer.on_start(3, "PPO")
        for step, kl in enumerate([-4.2e-6, float("nan"), 0.00318]):
            observer.on_step(step, {"loss": 4.2e-6, "objective/kl": kl})
            observer._last_line = float("-inf")
    endings = [line.split("  ", 3)[-1] for line in output.getvalue().splitlines()[1:]]
    assert endings == ["kl 0  loss 4.2e-06", "kl nan  loss 4.2e-06", "kl 0.0032  loss 4.2e-06"]


def test_a_pipe_gets_no_control_characters():
    assert "\x1b" not in watch(terminal=False, seconds_per_step=10.0)


def test_a_terminal_gets_a_bar_with_the_steps_and_the_readings():
    text = watch(terminal=True, seconds_per_step=1.0)
    assert "20/20" in text
    assert "reward 4.75  kl 1.5" in text
    assert "12 prompts [left] out" in text


def fail_while_watched(console):
    with RichObserver(console) as observer:
        observer.on_start(3, "PPO")
        observer.on_call(0, "rollout")
        raise ZeroDivisionError


def test_the_terminal_is_given_back_when_the_run_fails():
    hide, show = "\x1b[?25l", "\x1b[?25h"
    output = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        fail_while_watched(Console(file=output, force_terminal=True))
    assert hide in output.getvalue()
    assert show in output.getvalue().rpartition(hide)[2]


def test_a_silent_observer_can_stand_in_for_any(capsys):
    observer: Observer = SilentObserver()
    observer.on_message("note")
    observer.on_start(2, "PPO")
    observer.on_call(0, "rollout")
    observer.on_step(0, {})
    observer.on_finish()
    assert capsys.readouterr() == ("", "")


def counts_of_a_run(*, terminal):
    output, clock = io.StringIO(), Clock()
    with RichObserver(Console(file=output, force_terminal=terminal, width=160), clock) as observer:
        for done in (10, 20, 30):
            observer.on_count("rows of a.jsonl", done, 30)
            clock.now += 4.0
        observer.on_start(2, "PPO")
        observer.on_call(0, "rollout")
        observer.on_count("completions", 3, 8)
        clock.now += 9.0
        observer.on_step(0, {})
        observer.on_step(1, {})
        observer.on_finish()
    return output.getvalue()


def test_a_long_wait_before_the_first_step_would_look_like_a_hang():
    lines = counts_of_a_run(terminal=False).splitlines()
    assert lines[0] == "rows of a.jsonl: 30/30  elapsed 0:00:08  eta 0:00:00"
    assert lines[1] == "PPO: 2 steps"
    assert not any("completions" in line for line in lines), "a log of long steps would be full of them"


def test_a_terminal_shows_how_far_a_long_call_is_beside_the_bar_of_the_steps():
    text = counts_of_a_run(terminal=True)
    assert "rows of a.jsonl" in text
    assert "completions 3/8" in text
