import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshift.data.loader import Loader
from meshift.errors import DataError


@given(num_items=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 2**32))
def test_an_epoch_would_repeat_or_miss_an_item(num_items, batch_size, seed):
    loader = Loader(num_items, batch_size, seed)
    drawn = [index for _ in range(3 * num_items) for index in next(loader)]
    for epoch in range(3):
        assert sorted(drawn[epoch * num_items : (epoch + 1) * num_items]) == list(range(num_items))


@given(
    num_items=st.integers(1, 30),
    batch_size=st.integers(1, 40),
    num_before=st.integers(0, 20),
    shuffle=st.booleans(),
)
def test_a_resumed_run_would_draw_other_batches(num_items, batch_size, num_before, shuffle):
    unbroken = Loader(num_items, batch_size, 3, shuffle)
    for _ in range(num_before):
        next(unbroken)
    resumed = Loader(num_items, batch_size, 3, shuffle)
    resumed.load_state_dict(unbroken.state_dict())
    assert resumed.num_drawn == num_before * batch_size
    assert [next(resumed) for _ in range(10)] == [next(unbroken) for _ in range(10)]


@given(num_items=st.integers(1, 30), batch_size=st.integers(1, 40), steps=st.lists(st.integers(0, 12)))
def test_a_step_would_get_other_rows_when_asked_for_out_of_turn(num_items, batch_size, steps):
    walk = Loader(num_items, batch_size, 3)
    in_turn = [next(walk) for _ in range(13)]
    loader = Loader(num_items, batch_size, 3)
    assert [loader.batch(step) for step in steps] == [in_turn[step] for step in steps]
    loader.batch(5)
    assert next(loader) == in_turn[6]


def test_every_batch_would_not_be_full_at_the_edge_of_an_epoch():
    loader = Loader(5, 3, 0)
    assert [len(next(loader)) for _ in range(7)] == [3] * 7


def test_epochs_or_seeds_would_share_one_order():
    loader = Loader(50, 50, 0)
    first, second = next(loader), next(loader)
    assert first != second
    assert next(Loader(50, 50, 1)) != first
    assert next(Loader(50, 50, 0)) == first


def test_without_shuffling_the_order_would_not_be_the_files():
    loader = Loader(3, 2, 0, shuffle=False)
    assert [next(loader) for _ in range(3)] == [[0, 1], [2, 0], [1, 2]]


@pytest.mark.parametrize(("num_items", "seed", "shuffle"), [(6, 1, True), (5, 2, True), (5, 1, False)])
def test_resuming_on_other_data_or_seed_would_pass_unnoticed(num_items, seed, shuffle):
    with pytest.raises(DataError, match="resume with the data and seed"):
        Loader(num_items, 2, seed, shuffle).load_state_dict(Loader(5, 2, 1).state_dict())


@pytest.mark.parametrize(("num_items", "batch_size"), [(0, 1), (1, 0)])
def test_a_loader_of_nothing_would_spin_forever(num_items, batch_size):
    with pytest.raises(DataError, match="at least 1"):
        Loader(num_items, batch_size, 0)
