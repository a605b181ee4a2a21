"""Random numbers by counter: one uniform number for each (seed, sequence index, position), with no state.

Knows nothing of sampling. A sequence therefore draws the same numbers whatever else is in the batch.
"""

from collections.abc import Sequence

import numpy as np

Integers = Sequence[int] | np.ndarray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniforms(seed: int, indices: Integers, positions: Integers) -> np.ndarray:
    """Float64 [N] in [0, 1): the number of each (seed, indices[i], positions[i]), 53 random bits.

    h = mix(mix(mix(seed) + G (index + 1)) + G (position + 1)), u = (h >> 11) / 2**53: the positions of one
    sequence run through one SplitMix64 generator (Steele, Lea, Flood 2014: G and mix), started at a hash of
    seed and index.

    On the host in numpy's uint64, where overflow is defined (it is not for the int64 of torch), so that every
    device sees the same bits. Any integers are taken, modulo 2**64.
    """
    state = _mix(_words([seed]))
    state = _mix(state + GOLDEN * (_words(indices) + np.uint64(1)))
    state = _mix(state + GOLDEN * (_words(positions) + np.uint64(1)))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _words(numbers: Integers) -> np.ndarray:
    if isinstance(numbers, np.ndarray):
        return numbers.astype(np.uint64)  # two's complement: modulo 2**64
    return np.array([number & 0xFFFFFFFFFFFFFFFF for number in numbers], dtype=np.uint64)


def _mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer: a bijection of words in which every input bit reaches every output bit."""
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))
