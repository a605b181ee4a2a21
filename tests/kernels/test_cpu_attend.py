"""Attention of a decode step: what a row sees of its slot, against a loop over rows and heads."""

import pytest
import torch
from kernel_twins import near, random_numbers
from threads import num_threads

SCALE = 0.17


def cache_of(slots, kv_heads, reach, dim):
    return [random_numbers(slots, kv_heads, reach, dim, seed=s) for s in (1, 2)]


def expected_of(query, keys, values, positions, window):
    """A loop over rows and heads in fp64."""
    found = torch.empty(query.shape, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for r, last in enumerate(positions.tolist()):
        seen = slice(max(0, last + 1 - window) if window else 0, last + 1)
        for h in range(query.shape[1]):
            key, value = (part[r, h // group, seen].double() for part in (keys, values))
            found[r, h] = torch.softmax(key @ query[r, h].double() * SCALE, 0) @ value
    return found


@pytest.mark.parametrize("window", [0, 1, 20, 128, 500])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (16, 1), (4, 1), (10, 2)])
def test_a_row_would_not_see_its_positions(cpu, heads, kv_heads, window):
    positions = torch.tensor([0, 1, 15, 16, 127, 128, 255, 399])
    query = random_numbers(8, heads, 64, scale=2)
    keys, values = cache_of(9, kv_heads, 400, 64)
    found = cpu.attend(query, keys, values, positions, window=window, scale=SCALE)
    near(found, expected_of(query, keys, values, positions, window), within=2**-8)


@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
@pytest.mark.parametrize("window", [0, 7])
def test_a_size_of_heads_would_not_be_served(cpu, dim, window):
    positions = torch.tensor([3, 290, 140])
    query = random_numbers(3, 6, dim)
    keys, values = cache_of(3, 2, 320, dim)
    found = cpu.attend(query, keys, values, positions, window=window, scale=SCALE)
    near(found, expected_of(query, keys, values, positions, window), within=2**-8)


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("positions", [[0, 130, 255], [17, 128, 40]])
def test_what_lies_beyond_a_row_or_before_its_window_would_leak(cpu, window, positions):
    query, places = random_numbers(3, 6, 32), torch.tensor(positions)
    keys, values = cache_of(4, 2, 256, 32)
    clean = cpu.attend(query, keys, values, places, window=window, scale=SCALE)
    for row, last in enumerate(positions):
        first = max(0, last + 1 - window) if window else 0
        for part in (keys, values):
            part[row, :, last + 1 :] = torch.nan
            part[row, :, :first] = torch.nan
    for part in (keys, values):
        part[3] = torch.nan
    assert cpu.attend(query, keys, values, places, window=window, scale=SCALE).equal(clean)


def test_a_value_that_is_no_number_would_be_hidden(cpu):
    query, (keys, values) = random_numbers(2, 2, 32), cache_of(2, 1, 160, 32)
    keys[0, 0, 140, 3] = torch.nan
    found = cpu.attend(query, keys, values, torch.tensor([150, 150]), window=0, scale=SCALE)
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_large_scores_would_overflow(cpu, size):
    query, (keys, values) = random_numbers(2, 4, 64, scale=size), cache_of(2, 2, 300, 64)
    positions = torch.tensor([299, 200])
    found = cpu.attend(query, keys, values, positions, window=0, scale=SCALE)
    near(found, expected_of(query, keys, values, positions, 0), within=2**-7)


def test_a_rows_bits_would_depend_on_company_stride_or_threads(cpu):
    rows = random_numbers(5, 8 * 32)
    query = rows[:, 32 : 5 * 32].unflatten(1, (4, 32))
    assert not query.is_contiguous()
    keys, values = cache_of(5, 2, 300, 32)
    positions = torch.tensor([299, 3, 150, 0, 128])
    whole = cpu.attend(query.clone(), keys, values, positions, window=0, scale=SCALE)
    for threads in (1, 2):
        with num_threads(threads):
            assert cpu.attend(query, keys, values, positions, window=0, scale=SCALE).equal(whole)
            alone = (query[2:3], keys[2:3], values[2:3], positions[2:3])
            assert cpu.attend(*alone, window=0, scale=SCALE).equal(whole[2:3])
