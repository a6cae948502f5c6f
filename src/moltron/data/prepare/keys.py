"""128-bit keys of strings, in numpy: equal strings, look-ups and draws over millions of records in flat memory.

    b"ID" ──blake2b──> 16 bytes ──array──> (N, 2) uint64 ──first_of_equals | Lookup.find | draw──> row numbers

Two different strings share a key with a probability of about N² / 2^129: never. Knows nothing of records.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from itertools import pairwise

import numpy as np


def key(value: bytes) -> bytes:
    return blake2b(value, digest_size=16).digest()


def as_array(keys: bytes | bytearray) -> np.ndarray:
    """Keys written one after the other -> (N, 2) uint64, without a copy."""
    return np.frombuffer(keys, dtype="<u8").reshape(-1, 2)


def keys_of(values: Iterable[str]) -> np.ndarray:
    return as_array(b"".join(key(value.encode("utf-8", "surrogateescape")) for value in values))


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """keys (N, 2) -> (N,) int64: for each row the first with the same key. Takes some 26 bytes a row, for a moment."""
    order = np.argsort(keys[:, 0], kind="stable")
    half = keys[order, 0]
    touched = np.zeros(len(keys), dtype=bool)  # shares half a key: only these few are compared whole
    touched[1:] = half[1:] == half[:-1]
    touched[:-1] |= touched[1:]
    rows = order[touched]
    del order, half
    order = rows[np.lexsort((rows, keys[rows, 1], keys[rows, 0]))]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (keys[order[1:]] != keys[order[:-1]]).any(axis=1)
    result = np.arange(len(keys))
    result[order] = order[new][np.cumsum(new) - 1]
    return result


class Lookup:
    """From key to row; of equal keys the first row."""

    def __init__(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """keys (N, 2) of the table's entries, rows (N,) ascending: what find() answers with."""
        order = np.argsort(keys[:, 0], kind="stable")
        self._keys = keys[order]
        self._rows = rows[order]

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """(M, 2) -> (M,) int64, -1 where there is none."""
        if not len(self._rows):
            return np.full(len(wanted), -1)
        place = np.minimum(np.searchsorted(self._keys[:, 0], wanted[:, 0]), len(self._rows) - 1)
        return np.where((self._keys[place] == wanted).all(axis=1), self._rows[place], -1)


def draw(keys: np.ndarray, rows: np.ndarray, seed: int, *sizes: int) -> list[np.ndarray]:
    """Disjoint subsets of `rows`, of these sizes, by a hash of (seed, key of the row) alone, not by their order."""
    salt = np.uint64(int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest(), "little"))
    mixed = keys[rows, 0] ^ salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's finalizer
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    total = sum(sizes)
    least = np.argpartition(mixed, total)[:total] if total < len(rows) else np.arange(len(rows))
    least = least[np.argsort(mixed[least], kind="stable")]
    ends = np.cumsum([0, *sizes])
    return [np.sort(rows[least[a:b]]) for a, b in pairwise(ends)]
