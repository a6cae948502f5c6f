"""Windows tile the sequence, keep their overlap and never reach beyond it."""

import numpy as np
import pytest

from moltron.infer.windows import cut, merge


@pytest.mark.parametrize("limit", [2, 10, 64])
@pytest.mark.parametrize("overlap", [0, 1, 3, 9, 63])
def test_windows_tile_and_overlap(limit, overlap):
    if overlap >= limit:
        with pytest.raises(ValueError, match="overlap"):
            cut(100, limit, overlap)
        return
    for length in [*range(1, 150), 1000]:
        begins, ends, keep_from, keep_to = cut(length, limit, overlap).T
        assert keep_from[0] == 0 and keep_to[-1] == length and np.array_equal(keep_from[1:], keep_to[:-1])
        assert (begins <= keep_from).all() and (keep_to <= ends).all() and (keep_from < keep_to).all()
        assert (ends - begins == min(limit, length)).all()
        assert (ends[:-1] - begins[1:] >= overlap).all()
        assert len(begins) == max(1, -(-(length - overlap) // (limit - overlap)))  # not more than needed


def test_a_seam_lies_in_the_middle_of_the_overlap():
    assert cut(16, 10, 4).tolist() == [[0, 10, 0, 8], [6, 16, 8, 16]]


def test_merge_weighs_windows_by_their_residues():
    pooled = np.array([[6.0], [2.0], [10.0]], dtype=np.float32)
    kept, owners = np.array([3, 1, 4]), np.array([0, 0, 1])
    assert merge(pooled, kept, owners, "mean").tolist() == [[2.0], [2.5]]
    assert merge(pooled, kept, owners, "max").tolist() == [[6.0], [10.0]]
    assert merge(pooled, kept, owners, "cls").tolist() == [[4.0], [10.0]]
