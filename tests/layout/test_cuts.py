"""Tensor cuts: every part of the heads is a whole attention of its own, whatever the numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.errors import LayoutError
from meshift.layout.shard import Split


def heads_and_kv_heads(num_kv_heads, queries_per_kv):
    return (
        Split(
            dim=0, unit=1, num_units=num_kv_heads * queries_per_kv, group="heads", queries_per_kv=queries_per_kv
        ),
        Split(dim=0, unit=1, num_units=num_kv_heads, group="kv_heads", queries_per_kv=queries_per_kv),
    )


@given(data=st.data(), num_kv_heads=st.integers(1, 12), queries_per_kv=st.integers(1, 12))
def test_each_query_head_finds_its_key_value_head_as_in_a_smaller_decoder(data, num_kv_heads, queries_per_kv):
    heads, kv_heads = heads_and_kv_heads(num_kv_heads, queries_per_kv)
    num_parts = data.draw(st.integers(1, num_kv_heads * queries_per_kv))
    seen, kv_seen = [], set()
    for part in range(num_parts):
        queries, keys = range(*heads.units(part, num_parts)), range(*kv_heads.units(part, num_parts))
        assert len(queries) > 0
        assert len(queries) % len(keys) == 0, "the part is no decoder: its key-value heads are shared unevenly"
        local_group = len(queries) // len(keys)
        assert [keys[i // local_group] for i in range(len(queries))] == [q // queries_per_kv for q in queries]
        seen += queries
        kv_seen |= set(keys)
    assert seen == list(range(num_kv_heads * queries_per_kv))
    assert kv_seen == set(range(num_kv_heads))


@given(data=st.data(), num_kv_heads=st.integers(1, 12), queries_per_kv=st.integers(1, 12))
def test_sharers_are_the_parts_with_the_same_key_value_heads(data, num_kv_heads, queries_per_kv):
    heads, kv_heads = heads_and_kv_heads(num_kv_heads, queries_per_kv)
    num_parts = data.draw(st.integers(1, num_kv_heads * queries_per_kv))
    for split in (heads, kv_heads):
        held = [split.units(part, num_parts) for part in range(num_parts)]
        for part in range(num_parts):
            same = [other for other in range(num_parts) if held[other] == held[part]]
            assert list(split.sharers(part, num_parts)) == same


@given(data=st.data(), num_kv_heads=st.integers(1, 12), queries_per_kv=st.integers(1, 12))
def test_no_part_has_more_heads_than_whole_key_value_heads_make_needed(data, num_kv_heads, queries_per_kv):
    heads, kv_heads = heads_and_kv_heads(num_kv_heads, queries_per_kv)
    num_parts = data.draw(st.integers(1, num_kv_heads * queries_per_kv))
    most_kv = -(-num_kv_heads // num_parts)
    fewest_sharers = max(1, num_parts // num_kv_heads)
    for part in range(num_parts):
        start, stop = kv_heads.units(part, num_parts)
        assert stop - start <= most_kv
        start, stop = heads.units(part, num_parts)
        assert stop - start <= most_kv * -(-queries_per_kv // fewest_sharers)


@pytest.mark.parametrize(
    ("group", "num_units", "says"),
    [
        ("heads", 6, "6 query heads cannot be cut into 7 parts; use t6 or less"),
        ("kv_heads", 3, "6 query heads cannot be cut into 7 parts; use t6 or less"),
        ("mlp_columns", 5, "5 MLP columns cannot be cut into 7 parts; use t5 or less"),
        ("vocabulary", 5, "5 vocabulary rows cannot be cut into 7 parts; use t5 or less"),
    ],
)
def test_more_parts_than_units_are_refused_with_the_most_that_can_be(group, num_units, says):
    queries_per_kv = 2 if "heads" in group else 1
    split = Split(dim=0, unit=4, num_units=num_units, group=group, queries_per_kv=queries_per_kv)
    with pytest.raises(LayoutError, match=says):
        split.bounds(0, 7)
