"""Alternation and statistics of the benchmark, with sides that are lists of numbers."""

import pytest

from benchmarks.contestant import ContestantError, Round
from benchmarks.rounds import Summary, alternation, duel, paired_ratio


def played(seconds, num_tokens=100, others=0.0, stolen=0.0):
    return Round(seconds=seconds, num_tokens=num_tokens, others=others, stolen=stolen)


class Scripted:
    def __init__(self, name, diary, num_tokens=10):
        self.name, self.diary, self.num_tokens = name, diary, num_tokens

    def round(self, *, number):
        self.diary.append((self.name, number))
        return played(1.0 + number, self.num_tokens)


def test_sides_take_turns_so_that_the_weather_of_the_machine_is_shared():
    assert list(alternation(["ours", "peer"], 3)) == ["ours", "peer"] * 3


def test_a_duel_alternates_and_drops_its_warm_ups():
    diary = []
    sides = {name: Scripted(name, diary) for name in ("ours", "peer")}
    rounds = duel(sides, num_rounds=3, num_warm_ups=1, options={})
    assert diary == [(name, number) for number in range(4) for name in ("ours", "peer")]
    assert [r.seconds for r in rounds["ours"]] == [2.0, 3.0, 4.0]


def test_sides_that_did_different_work_are_not_compared():
    diary = []
    sides = {"ours": Scripted("ours", diary), "peer": Scripted("peer", diary, num_tokens=11)}
    with pytest.raises(ContestantError, match=r"did not see the same work.*10.*11"):
        duel(sides, num_rounds=3, num_warm_ups=0, options={})
    assert duel(sides, num_rounds=3, num_warm_ups=0, options={"same_tokens": False})


def test_a_noisy_round_does_not_move_the_median_while_most_are_quiet():
    rounds = [played(1.0), played(9.0, others=1.0), played(1.2), played(1.1)]
    summary = Summary.of(rounds)
    assert summary.seconds == pytest.approx(1.1)
    assert (summary.num_rounds, summary.num_noisy) == (4, 1)


def test_where_most_rounds_are_noisy_all_of_them_count_and_are_counted():
    rounds = [played(1.0), played(3.0, others=0.5), played(2.0, stolen=0.5)]
    assert (Summary.of(rounds).seconds, Summary.of(rounds).num_noisy) == (2.0, 2)


def test_rate_is_a_median_of_rates_not_a_rate_of_medians():
    rounds = [played(1.0, 100), played(2.0, 1000), played(4.0, 100)]
    assert Summary.of(rounds).rate == 100.0


def test_the_ratio_pairs_neighbours_so_that_a_machine_that_slows_down_cancels():
    ours = [played(1.0), played(2.0), played(4.0)]
    peer = [played(3.0), played(6.0), played(12.0)]
    assert paired_ratio(ours, peer) == pytest.approx(3.0)
