"""Sequences longer than a model: cut into overlapping windows, put together again without doubles.

residues 0 ………………………………………………………… L
window 0 |=========kept=========|~~~|
window 1                    |~~~|=======kept=======|~~~|        a seam lies in the middle of each overlap, so
window 2                                       |~~~|=====kept=====|    every residue is read where it sees most

P pieces (windows, or whole sequences), N sequences, D width
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

POLICIES = ("error", "truncate", "window")


def default_overlap(limit: int) -> int:
    return min(128, limit // 2)


def cut(length: int, limit: int, overlap: int) -> np.ndarray:
    """(W, 4) rows (begin, end, keep from, keep to), residues of the whole sequence; the kept parts tile it.

    Every window holds `limit` residues (all of them where length ≤ limit), evenly spread, neighbours sharing ≥ overlap.
    """
    if not 0 <= overlap < limit:
        raise ValueError(f"overlap={overlap} must be at least 0 and less than the {limit} residues of a window")
    if length <= limit:
        return np.array([[0, length, 0, length]])
    count = -(-(length - overlap) // (limit - overlap))
    begins = np.arange(count) * (length - limit) // (count - 1)
    ends = begins + limit
    seams = (begins[1:] + ends[:-1]) // 2
    return np.stack([begins, ends, np.r_[0, seams], np.r_[seams, length]], axis=1)


def merge(pooled: np.ndarray, kept: np.ndarray, owners: np.ndarray, pooling: str) -> np.ndarray:
    """One vector a sequence from the vectors of its pieces.

    pooled: (P, D), see engine.Encoded; kept: (P,) rows of each piece; owners: (P,) index of its sequence, ascending,
    no gaps.
    mean: Σ sums / Σ rows. max: the largest. cls: mean over the pieces' first tokens.
    """
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    if pooling == "max":
        return np.maximum.reduceat(pooled, first, axis=0)
    weights = np.add.reduceat(kept if pooling == "mean" else np.ones_like(kept), first)
    return np.add.reduceat(pooled, first, axis=0) / weights[:, None].astype(np.float32)


def stitch(pieces: list[np.ndarray], owners: np.ndarray) -> list[np.ndarray]:
    """N arrays of P: the kept rows of each sequence's pieces, one after another."""
    bounds = [*np.flatnonzero(np.diff(owners, prepend=-1)).tolist(), len(owners)]
    return [pieces[a] if b - a == 1 else np.concatenate(pieces[a:b]) for a, b in pairwise(bounds)]
