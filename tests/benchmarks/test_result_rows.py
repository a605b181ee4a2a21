"""The rows of the result: their schema, and what the table says of them."""

import json

import pytest

from benchmarks.contestant import Round
from benchmarks.rows import Played, Row, alone, cells, missing, row_of
from benchmarks.works import all_works

KEYS = {"work", "peer_name", "unit", "ours", "peer", "ratio", "of_limit", "peak_memory_gb", "peer_memory_gb"}
BY_NAME = {work.name: work for work in all_works()}
GENERATION = BY_NAME["generation, batch 8, forced length"]
PPO = BY_NAME["ppo step"]


def side(seconds, calls=None, memory_gb=1.5):
    extra = {"calls": calls} if calls else {}
    rounds = [Round(seconds=s, num_tokens=100, others=0.0, stolen=0.0, extra=extra) for s in seconds]
    return Played(about={"settings": "bf16", "versions": {"torch": "2"}}, rounds=rounds, memory_gb=memory_gb)


def test_a_row_has_the_keys_that_readers_of_the_json_rely_on():
    row = row_of(GENERATION, "vllm", "", side([1.0] * 3), side([2.0] * 3, memory_gb=4.0), 0.5)
    written = json.loads(json.dumps(row.as_json()))
    assert set(written) >= KEYS | {"rounds", "num_noisy", "note", "details"}
    assert (written["ours"], written["peer"], written["ratio"]) == (100.0, 50.0, 2.0)
    assert (written["of_limit"], written["peak_memory_gb"], written["peer_memory_gb"]) == (0.5, 1.5, 4.0)


def test_a_ratio_above_one_means_that_we_are_faster_also_where_less_is_more():
    row = row_of(PPO, "trl", "", side([2.0] * 3), side([8.0] * 3), 1.0)
    assert (row.unit, row.ours, row.peer, row.ratio) == ("s/step", 2.0, 8.0, 4.0)


def test_the_split_by_call_is_a_median_over_rounds():
    rounds = [
        Round(seconds=1.0, num_tokens=1, others=0.0, stolen=0.0, extra={"calls": {"rollout": s}})
        for s in (1, 5, 2)
    ]
    played = Played(about={}, rounds=rounds, memory_gb=1.0)
    assert alone(PPO, played, 1.0).details["ours"]["calls"] == {"rollout": 2}


def test_every_round_can_be_checked_for_noise():
    row = row_of(GENERATION, "vllm", "", side([1.0, 2.0, 3.0]), side([2.0] * 3), 0.5)
    assert [set(r) for r in row.details["peer"]["rounds"]] == [{"seconds", "num_tokens", "others", "stolen"}] * 3


def test_a_peer_that_cannot_be_installed_is_one_sentence_in_the_table():
    row = missing(GENERATION, "vllm", "vllm could not be installed (No matching distribution)")
    assert cells(row)[0] == GENERATION.name
    assert cells(row)[-1] == "vllm could not be installed (No matching distribution)"
    assert cells(row)[2:4] == ["", ""]


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (None, "")])
def test_figures_have_no_more_digits_than_they_deserve(value, text):
    assert cells(Row(work="w", peer_name="p", unit="tokens/s", ours=value))[2] == text
