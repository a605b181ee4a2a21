"""The choice of senders, against every possible choice and on layouts of a size that is used."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tables import family_table

from meshift.layout.layout import Placement
from meshift.realloc.plan import plan
from meshift.realloc.sources import choose_senders

RANKS = 4
CANDIDATES = st.sets(st.integers(0, RANKS - 1), min_size=1).map(lambda ranks: tuple(sorted(ranks)))


def peak(sizes, senders, fixed):
    loads = list(fixed)
    for size, sender in zip(sizes, senders, strict=True):
        loads[sender] += size
    return max(loads)


@given(
    parcels=st.lists(st.tuples(st.integers(0, 9), CANDIDATES), max_size=6),
    fixed=st.lists(st.integers(0, 12), min_size=RANKS, max_size=RANKS),
)
def test_senders_hold_what_they_send_and_loads_lie_between_the_bound_and_twice_the_best(parcels, fixed):
    sizes, candidates = [size for size, _ in parcels], [ranks for _, ranks in parcels]
    choice = choose_senders(sizes, candidates, fixed)
    assert all(sender in ranks for sender, ranks in zip(choice.senders, candidates, strict=True))
    best = min(peak(sizes, senders, fixed) for senders in product(*candidates))
    assert choice.least_peak <= best <= peak(sizes, choice.senders, fixed) <= 2 * best


def test_a_parcel_that_came_first_makes_way_for_one_that_has_no_choice():
    choice = choose_senders([5, 5], [(0, 1), (0,)], [0, 0])
    assert list(choice.senders) == [1, 0]


@given(num_ranks=st.integers(1, 9), num_parcels=st.integers(1, 60))
def test_equal_parcels_that_anyone_may_send_are_spread_evenly(num_ranks, num_parcels):
    everybody = tuple(range(num_ranks))
    choice = choose_senders([7] * num_parcels, [everybody] * num_parcels, [0] * num_ranks)
    counts = [choice.senders.count(rank) for rank in everybody]
    assert max(counts) - min(counts) <= 1
    assert choice.least_peak == -(-7 * num_parcels // num_ranks)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (("0-7", "d8t1p1"), ("8", "d1t1p1")),
        (("0-7", "d4t2p1"), ("8-11", "d1t4p1")),
        (("0-15", "d4t2p2"), ("16-23", "d2t4p1")),
        (("0-15", "d4t2p2"), ("0-15", "d2t4p2")),
        (("n0:0-7,n1:0-7", "d8t2p1"), ("n2:0-3", "d1t4p1")),
    ],
)
def test_the_busiest_sender_sends_at_most_five_percent_more_than_it_must(source, target):
    shards = family_table("llama", vocab_size=6007, hidden_size=256, intermediate_size=700, num_hidden_layers=6,
                          num_attention_heads=12, num_key_value_heads=4, head_dim=32)  # fmt: skip
    made = plan(Placement.parse(*source), Placement.parse(*target), shards, finest=1024)
    assert 1.0 <= made.balance <= 1.05


def test_replicas_that_all_hold_everything_share_the_sending_equally():
    shards = family_table("llama", vocab_size=6007, hidden_size=256)
    made = plan(Placement.parse("0-7", "d8t1p1"), Placement.parse("8", "d1t1p1"), shards, finest=1024)
    assert max(made.sent) <= 1.05 * made.wire_bytes / 8


def test_a_deeper_model_of_the_same_layers_makes_no_plan_with_more_routes():
    """Layers repeat: what a plan costs follows the ranks and stages, not the layers."""
    source = Placement.parse("0-63", "d4t8p2")
    target = Placement.parse("64-127", "d4t4p4")
    num_routes = []
    for num_layers in (16, 160):
        shards = family_table("llama", num_hidden_layers=num_layers, num_attention_heads=8, num_key_value_heads=8)
        made = plan(source, target, shards)
        assert made.num_transfers > 60 * num_layers
        num_routes.append(sum(len(moves.wire) for moves in made.moves))
    assert num_routes[1] <= 1.1 * num_routes[0]
