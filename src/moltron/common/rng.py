"""Randomness without state: every draw is a function of a seed, a named stream and some counters.

    seed, stream ──hash_u64──> state ──fold(counter)──> state ──fold(counter)──> bits ──bounded──> a draw

Two processes that ask for the same counters get the same bits, so a resume, another number of ranks or another order
of work changes nothing. All functions take and return numpy arrays and broadcast. Knows nothing of what is drawn.

The mixing is the finaliser of splitmix64 (Steele, Lea & Flood 2014, constants "Mix13" by Stafford).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

U64 = NDArray[np.uint64]

# Streams. A number once given to a purpose stays: changing one changes every run's data.
ORDER = 1  # the order of records (or clusters) in an epoch
MEMBER = 2  # which member of a cluster
CROP = 3  # where a crop begins
BINS = 4  # the order of a window's bins
MASK = 5  # which residues are targets, and what becomes of them
SPLIT = 6  # train, validation, test
NOISE = 7  # what is added to hidden states before they are decoded
SAMPLE = 8  # tokens drawn while decoding
TARGET = 9  # which of a molecule's SMILES a decoder writes
VARIANT = 16  # the randomised SMILES of a molecule

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
_LOW32 = np.uint64(0xFFFFFFFF)
_S11, _S27, _S30, _S31, _S32 = (np.uint64(shift) for shift in (11, 27, 30, 31, 32))


def fold(state: U64, counter: ArrayLike) -> U64:
    """Mix one more counter (integers ≥ 0) into `state`; for one state, different counters never collide."""
    x = np.array(counter, dtype=np.uint64, ndmin=1)  # a copy: mixed in place
    x += np.uint64(1)
    x *= GAMMA
    x = x + state
    x ^= x >> _S30
    x *= MIX1
    x ^= x >> _S27
    x *= MIX2
    x ^= x >> _S31
    return x


def hash_u64(seed: int, stream: int, *counters: ArrayLike) -> U64:
    """64 random bits for each element of the broadcast `counters`; shape (1,) where all are scalars."""
    state = fold(np.full(1, seed % 2**64, dtype=np.uint64), stream)
    for counter in counters:
        state = fold(state, counter)
    return state


def bounded(bits: U64, n: ArrayLike) -> NDArray[np.int64]:
    """Integers in [0, n), 1 ≤ n < 2³², from random bits: the high word of bits · n, whose bias is below n / 2⁶⁴."""
    n = np.asarray(n, dtype=np.uint64)
    low = ((bits & _LOW32) * n) >> _S32
    return (((bits >> _S32) * n + low) >> _S32).astype(np.int64)


def unit(bits: U64) -> NDArray[np.float64]:
    """Numbers in [0, 1), 53 bits each."""
    return (bits >> _S11).astype(np.float64) * 2.0**-53


def threshold(probability: float) -> np.uint64:
    """The number t for which `bits < t` is true with this probability (1.0: all but one of 2⁶⁴)."""
    return np.uint64(min(int(probability * 2**64), 2**64 - 1))


class Permutation:
    """A random order of 0 … n−1 that needs no memory: `perm[i]` is computed, for arrays of i, for every n.

    A Feistel network permutes the smallest power of two ≥ n (and ≥ 2⁶, below which its halves would be too narrow to
    mix); a result ≥ n is sent through again until it is < n (cycle walking: less than once more on average for n > 32).
    """

    ROUNDS = 8

    def __init__(self, n: int, seed: int, epoch: int):
        self.n = n
        bits = max(6, (n - 1).bit_length())
        self._widths = bits // 2, bits - bits // 2  # of the left and the right half
        self._keys = hash_u64(seed, ORDER, epoch, np.arange(self.ROUNDS))

    def __getitem__(self, index: ArrayLike) -> NDArray[np.int64]:
        shape = np.shape(index)
        x = np.atleast_1d(np.asarray(index, dtype=np.int64)).ravel().astype(np.uint64)
        if x.size and int(x.max()) >= self.n:  # a negative index is a huge one here
            raise IndexError(f"index {np.max(index)} outside a permutation of {self.n}")
        x = self._permute(x)
        outside = np.flatnonzero(x >= self.n)
        while outside.size:
            x[outside] = again = self._permute(x[outside])
            outside = outside[again >= self.n]
        return x.astype(np.int64).reshape(shape)

    def _permute(self, x: U64) -> U64:
        left_bits, right_bits = self._widths
        left, right = x >> np.uint64(right_bits), x & np.uint64(2**right_bits - 1)
        for key in self._keys:  # the halves change places, so do their widths; ROUNDS is even
            left, right = right, left ^ (fold(key, right) >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right
