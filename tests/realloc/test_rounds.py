"""Rounds: a device looks at its own share only, and still both ends of every transfer agree, under the bound."""

import pytest
from byte_executor import Executor, place, whole_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_realloc_plan import FP32, assert_delivered
from tiny_tables import family_table, placement_pairs, random_tables

from meshift.errors import LayoutError
from meshift.layout.layout import Placement
from meshift.realloc.plan import plan
from meshift.realloc.rounds import rounds_of


def everywhere(made, max_bytes):
    devices = {*made.source.mesh.devices, *made.target.mesh.devices}
    return {device: rounds_of(made, device, max_bytes) for device in devices}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data(), shards=random_tables(), max_bytes=st.sampled_from([96, 200, 1000, 10**6]))
def test_rounds_deliver_every_number_once_and_stay_under_the_bound(data, shards, max_bytes):
    made = plan(*data.draw(placement_pairs(shards)), shards, dtypes=FP32)
    rounds = everywhere(made, max_bytes)
    for some in rounds.values():
        for part in some:
            assert sum(t.num_bytes for t in part.sends) <= max_bytes // 2
            assert sum(t.num_bytes for t in part.receives) <= max_bytes // 2
    whole = whole_model(shards)
    executor = Executor(made, shards, place(whole, made.source, shards))
    executor.run(rounds)  # which fails where the two ends of a round do not agree
    assert_delivered(executor, whole, shards)
    assert executor.wire_bytes == made.wire_bytes


def test_a_bound_that_all_fits_under_makes_one_round_of_uncut_transfers():
    made = plan(Placement.parse("0-3", "d2t2p1"), Placement.parse("2-5", "d1t4p1"), family_table("llama"))
    for device, some in everywhere(made, 10**9).items():
        share = made.share(device)
        assert [(set(r.sends), set(r.receives)) for r in some] == [(set(share.sends), set(share.receives))]


def test_a_bound_too_small_for_one_number_from_each_peer_is_refused_with_the_least_that_works():
    shards = family_table("llama")
    source, target = Placement.parse("0-3", "d4t1p1s"), Placement.parse("0-3", "d4t1p1")
    made = plan(source, target, shards, leave_out=set(shards) - {"norm.weight"})
    with pytest.raises(LayoutError, match="3 peers; allow at least 12"):
        everywhere(made, 11)
    assert everywhere(made, 12)
