"""64-bit keys of strings, in numpy: equal strings, look-ups and draws over millions of records in flat memory.

    "ID" ──blake2b──> 8 bytes ──array──> (N,) uint64 ──first_of_equals | Lookup.find | draw──> row numbers

Two of N different strings share a key with a probability of N² / 2^65: 0.01 % for all of UniRef50, and then one record
is taken for a copy of another. Knows nothing of records.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise

import numpy as np

from moltron.common import rng


def key(value: bytes) -> bytes:
    return blake2b(value, digest_size=8).digest()


def keys_of(values: Iterable[str]) -> np.ndarray:
    joined = b"".join(key(value.encode("utf-8", "surrogateescape")) for value in values)
    return np.frombuffer(joined, dtype=np.uint64)


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """keys (N,) -> (N,) int64: for each row the first with the same key."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return np.take(first, which, out=which)


class Lookup:
    """From key to row; of equal keys the first row."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """keys (N,) of the table's entries, rows (N,) ascending: what find() answers with."""
        order = np.argsort(keys, kind="stable")
        self._keys, self._rows = keys[order], rows[order]

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """(M,) -> (M,) int64, -1 where there is none."""
        if not len(self._rows):
            return np.full(len(wanted), -1)
        place = np.minimum(np.searchsorted(self._keys, wanted), len(self._rows) - 1)
        return np.where(self._keys[place] == wanted, self._rows[place], -1)


def draw(keys: np.ndarray, rows: np.ndarray, seed: int, *sizes: int) -> list[np.ndarray]:
    """Disjoint subsets of `rows`, of these sizes, by a hash of (seed, key of the row) alone, not by their order."""
    drawn = rows[np.argsort(rng.hash_u64(seed, rng.SPLIT, keys[rows]))]
    return [np.sort(drawn[a:b]) for a, b in pairwise(np.cumsum([0, *sizes]))]
