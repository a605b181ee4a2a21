"""The independent judge: it tells good from bad, and says what to install where it is missing."""

import sys

import pytest

from meshift.errors import InputError
from meshift.evaluation.judges import vader


def test_vader_tells_praise_from_blame():
    pytest.importorskip("vaderSentiment")
    good, bad, neutral = vader(["A wonderful, great film!", "A terrible, boring mess.", "It is a film."])
    assert 0.5 < good <= 1
    assert -1 <= bad < -0.3
    assert neutral == 0


def test_without_the_extra_the_judge_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(InputError, match=r"pip install 'meshift\[quickstart\]'"):
        vader(["a"])
