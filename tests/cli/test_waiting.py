"""Work with a limit of time shows its seconds, and never that they are all over while it goes on."""

import io
import time

from rich.console import Console

from meshift.cli.waiting import Waiting


def waited(seconds, most):
    output = io.StringIO()
    with Waiting("seconds of a search", most, Console(file=output, force_terminal=True, width=100), every=0.01):
        time.sleep(seconds)
    return output.getvalue()


def test_a_search_shows_its_seconds():
    assert "seconds of a search" in (text := waited(0.3, 20))
    assert "0/20" in text


def test_what_takes_longer_than_it_may_would_look_done():
    text = waited(1.8, 1)
    assert "0/1" in text
    assert "1/1" not in text


def test_what_ends_at_once_shows_nothing():
    assert "search" not in waited(0, 20)
