"""The batch: rows stay whole and in order whatever is done to it, and parts are balanced."""

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_rl import make_world, ppo_config

from meshift.batch import Batch, Ragged, balanced_partition, column_key, micro_batches, ranges

rows_of_ints = st.lists(st.lists(st.integers(-1000, 1000), max_size=6), min_size=1, max_size=8)
sizes = st.lists(st.integers(0, 50), max_size=7)


def ragged(rows, dtype=torch.int64):
    return Ragged.from_rows([torch.tensor(row, dtype=dtype) for row in rows])


def as_lists(value):
    return [row.tolist() for row in value.rows()]


def make_batch(rows):
    fields = {"tokens": ragged(rows), "scores": Ragged.scalars([float(sum(row)) for row in rows])}
    return Batch(fields, {"text": [str(row) for row in rows]})


def same(one, other):
    assert set(one.fields) == set(other.fields)
    for key in one.fields:
        assert one[key].values.dtype == other[key].values.dtype
        assert torch.equal(one[key].values, other[key].values)
        assert torch.equal(one[key].lengths, other[key].lengths)
    assert {k: list(v) for k, v in one.columns.items()} == {k: list(v) for k, v in other.columns.items()}


@given(rows_of_ints)
def test_rows_come_back_as_they_were_packed(rows):
    assert as_lists(ragged(rows)) == rows


@given(rows_of_ints, st.data())
def test_index_picks_the_named_rows_in_order_and_may_repeat_them(rows, data):
    picked = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10))
    assert as_lists(ragged(rows).index(torch.tensor(picked, dtype=torch.int64))) == [rows[i] for i in picked]


@given(rows_of_ints)
def test_row_ids_starts_and_sums_agree_with_a_loop(rows):
    value = ragged(rows)
    assert value.row_ids.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert value.starts.tolist() == list(itertools.accumulate((len(r) for r in rows), initial=0))[:-1]
    assert value.sum_rows().tolist() == [sum(row) for row in rows]


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=5).map(lambda r: [x % 997 for x in r]), min_size=1))
def test_drop_last_drops_the_last_of_every_row(rows):
    assert as_lists(ragged(rows).drop_last()) == [row[:-1] for row in rows]


def test_index_and_sums_keep_further_dims():
    value = Ragged(torch.arange(12.0).reshape(4, 3), torch.tensor([1, 0, 3]))
    assert value.index(torch.tensor([2, 1])).values.tolist() == value.values[1:].tolist()
    assert value.sum_rows().tolist() == [[0.0, 1.0, 2.0], [0.0] * 3, [18.0, 21.0, 24.0]]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=6))
def test_ranges_agree_with_a_loop(spans):
    starts, lengths = (torch.tensor([s[i] for s in spans], dtype=torch.int64) for i in (0, 1))
    assert ranges(starts, lengths).tolist() == [s + k for s, n in spans for k in range(n)]


@pytest.mark.parametrize("lengths", [torch.tensor([2, 2]), torch.tensor([1.0, 2.0]), torch.tensor([[3]])])
def test_lengths_that_do_not_fit_the_values_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths"):
        Ragged(torch.zeros(3), lengths)


@given(rows_of_ints, st.data())
def test_split_and_concat_are_each_others_inverse(rows, data):
    batch = make_batch(rows)
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    parts = [list(order[:cut]), list(order[cut:])]
    joined = Batch.concat(batch.split(parts))
    inverse = [list(order).index(i) for i in range(len(rows))]
    same(joined.index(inverse), batch)


def test_concat_refuses_batches_of_different_keys():
    batch = make_batch([[1], [2]])
    for other in (batch.select(["tokens", "scores"]), batch.select(["tokens", "text"])):
        with pytest.raises(ValueError, match="different keys"):
            Batch.concat([batch, other])


def test_select_and_union_give_back_the_whole():
    batch = make_batch([[1, 2], [], [3]])
    same(batch.select(["tokens"]).union(batch.select(["scores", "text"])), batch)


def test_union_takes_the_others_values():
    batch = make_batch([[1, 2], [3]])
    changed = batch.union(Batch({"scores": Ragged.scalars([8.0, 9.0])}))
    assert changed["scores"].values.tolist() == [8.0, 9.0]
    assert as_lists(changed["tokens"]) == [[1, 2], [3]]


def test_a_missing_key_is_named_with_those_that_exist():
    with pytest.raises(KeyError, match=r"no key 'token'; it has \['scores', 'tokens'\]"):
        make_batch([[1]]).select(["token"])


def test_keys_with_different_numbers_of_rows_are_refused():
    with pytest.raises(ValueError, match="same number of rows"):
        Batch({"a": ragged([[1], [2]])}, {"text": ["one"]})


@settings(deadline=None)
@given(
    rows_of_ints,
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool]),
)
def test_bytes_bring_every_type_and_every_column_back(rows, dtype):
    batch = Batch(
        {"x": ragged(rows, dtype), "y": Ragged.scalars(torch.arange(len(rows)).to(dtype))},
        {"text": [f'ä"\n{row}' for row in rows], "label": [{"answer": row, "none": None} for row in rows]},
    )
    same(Batch.from_bytes(batch.to_bytes()), batch)


def test_bytes_bring_infinities_and_nan_back_bit_for_bit():
    values = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    again = Batch.from_bytes(Batch({"x": Ragged.scalars(values)}).to_bytes())["x"].values
    assert torch.equal(again.view(torch.int32), values.view(torch.int32))


def test_bytes_are_safetensors_and_no_pickle():
    data = make_batch([[1, 2]]).to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert json.loads(header["__metadata__"]["columns"]) == {"text": ["[1, 2]"]}


def test_bytes_of_a_batch_without_rows_or_keys():
    assert len(Batch.from_bytes(Batch({}).to_bytes())) == 0
    empty = make_batch([[1]]).index([])
    same(Batch.from_bytes(empty.to_bytes()), empty)


def best_largest(items, num_parts):
    """The smallest possible largest part, by trying every assignment."""
    best = sum(items)
    for assignment in itertools.product(range(num_parts), repeat=len(items)):
        totals = [0] * num_parts
        for item, part in zip(items, assignment, strict=True):
            totals[part] += item
        best = min(best, max(totals))
    return best


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 3))
def test_partition_holds_every_item_once_and_keeps_grahams_bound(items, num_parts):
    parts = balanced_partition(items, num_parts)
    assert len(parts) == num_parts
    assert sorted(i for part in parts for i in part) == list(range(len(items)))
    assert all(part == sorted(part) for part in parts)
    largest = max(sum(items[i] for i in part) for part in parts)
    assert 3 * largest <= 4 * best_largest(items, num_parts)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_micro_batches_keep_the_budget_and_lose_nothing(items, budget):
    parts = micro_batches(items, budget)
    assert sorted(i for part in parts for i in part) == list(range(len(items)))
    for part in parts:
        assert part
        assert len(part) == 1 or sum(items[i] for i in part) <= budget


def test_micro_batches_are_as_few_as_the_tokens_allow():
    assert len(micro_batches([10] * 8, 40)) == 2
    assert len(micro_batches([10] * 8, 80)) == 1
    assert micro_batches([100, 1, 1], 10) != [[0, 1, 2]]


def test_micro_batches_of_nothing_run_nothing_twice():
    assert sum(len(part) for part in micro_batches([], 10)) == 0


def test_bytes_bring_the_batch_of_a_real_step_back():
    """Its fields share lengths, and some are views of others."""
    config = ppo_config(generation={"max_completion_length": 4, "top_k": 5}, ppo={"num_mini_batches": 1})
    world = make_world(lambda completion_ids: [float(len(ids)) for ids in completion_ids], config)
    batch = world.step([[1, 2], [3], [4, 5, 6]]).batch
    bf16 = Ragged(batch["logprobs"].values.bfloat16(), batch["logprobs"].lengths)
    batch = batch.union(Batch({"rounded": bf16}, {column_key("tokens"): ["a", None, {"b": [1]}]}))
    types = {value.values.dtype for value in batch.fields.values()}
    assert types >= {torch.bool, torch.int32, torch.int64, torch.float32, torch.bfloat16}
    same(Batch.from_bytes(batch.to_bytes()), batch)


def test_bytes_bring_transposed_values_that_share_memory_back():
    values = torch.arange(6.0).reshape(2, 3)
    batch = Batch({"a": Ragged(values, torch.tensor([2])), "b": Ragged(values.T, torch.tensor([3]))})
    same(Batch.from_bytes(batch.to_bytes()), batch)


def test_one_name_for_a_field_and_a_column_is_refused():
    with pytest.raises(ValueError, match="'index' is both a field and a column"):
        Batch({"index": ragged([[1]])}, {"index": ["one"]})
    with pytest.raises(ValueError, match="'tokens' is both a field and a column"):
        make_batch([[1]]).union(Batch({}, {"tokens": ["one"]}))


def test_a_field_that_ends_as_stored_lengths_do_is_refused():
    with pytest.raises(ValueError, match=r"'x\.lengths'"):
        Batch({"x.lengths": ragged([[1]])})
