"""Random numbers by counter: against SplitMix64 in Python's integers, and statistically."""

import numpy as np
import pytest

from meshift.generation.random_stream import uniforms

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(state: int) -> int:
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def reference(seed: int, index: int, position: int) -> float:
    state = mix(seed & MASK)
    for counter in (index, position):
        state = mix((state + GOLDEN * (counter + 1)) & MASK)
    return (state >> 11) / 2**53


def test_the_mixer_is_the_published_splitmix64():
    # The first outputs for seed 1234567, as listed by every published implementation of SplitMix64.
    outputs = [mix((1234567 + GOLDEN * (i + 1)) & MASK) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 11, -5, 2**70])
def test_numbers_equal_unbounded_integer_arithmetic(seed):
    indices, positions = [0, 1, 2, 10**12, 7], [0, 5, 2**31, 3, 0]
    expected = [reference(seed, i, p) for i, p in zip(indices, positions, strict=True)]
    assert uniforms(seed, indices, positions).tolist() == expected


AXES = {
    "positions": lambda n: uniforms(3, [7] * n, range(n)),
    "indices": lambda n: uniforms(3, range(n), [7] * n),
    "seeds": lambda n: np.concatenate([uniforms(seed, [7], [7]) for seed in range(n)]),
}


@pytest.mark.parametrize("axis", AXES)
def test_numbers_are_uniform_and_uncorrelated_along_each_counter(axis):
    n = 4000 if axis == "seeds" else 100_000
    numbers = AXES[axis](n)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 85.4  # chi-square, 49 degrees, p = 0.001
    for lag in (1, 2, 8, 64):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 4 / np.sqrt(n - lag)


def test_streams_of_neighbouring_indices_and_seeds_are_independent():
    n = 50_000
    one = uniforms(0, [0] * n, range(n))
    for other in (uniforms(0, [1] * n, range(n)), uniforms(1, [0] * n, range(n))):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / np.sqrt(n)
    grid = uniforms(0, np.repeat(np.arange(300), 300).tolist(), np.tile(np.arange(300), 300).tolist())
    assert len(np.unique(grid)) == grid.size
