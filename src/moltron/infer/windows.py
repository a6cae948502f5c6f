"""Sequences longer than a model: cut into overlapping windows, stitched again without doubles.

residues 0 ………………………………………………………… L
window 0 |=========kept=========|~~~|
window 1                    |~~~|=======kept=======|~~~|        a seam lies in the middle of each overlap, so
window 2                                       |~~~|=====kept=====|    every residue is read where it sees most
"""

from __future__ import annotations

import numpy as np

POLICIES = ("error", "truncate", "window")


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
