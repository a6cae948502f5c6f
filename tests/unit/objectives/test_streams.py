"""Parts that objectives share."""

import numpy as np
import pytest

from moltron.objectives.streams import smallest


@pytest.mark.parametrize("extra", [0, 2**20])
def test_the_smallest_bits_of_each_sequence(extra):
    """extra: a first sequence so long that the quick way has no room for its places."""
    rng = np.random.default_rng(0)
    lengths = np.array([extra, 5, 0, 300, 1, 40])
    bits = rng.integers(0, 2**64, lengths.sum(), dtype=np.uint64)
    bits[extra + 5 : extra + 25] = bits[extra + 5]  # ties: the first ones are taken
    count = lengths // 3 + (lengths > 0)
    ends = np.cumsum(lengths)
    expected = [
        np.sort(begin + np.argsort(bits[begin:end] >> np.uint64(40), kind="stable")[:n])
        for begin, end, n in zip(ends - lengths, ends, count, strict=True)
    ]
    assert np.array_equal(smallest(bits, lengths, count), np.concatenate(expected))
