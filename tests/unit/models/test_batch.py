"""PackedBatch.pack: sequences end to end, filler in sequences of its own, nothing lost."""

import numpy as np
import pytest
import torch

from moltron.models.batch import PackedBatch


def test_layout_of_a_pack():
    batch = PackedBatch.pack(np.arange(7), np.array([4, 3]), tokens=20, pad_id=1, max_length=8)
    assert batch.ids.tolist() == [*range(7), *[1] * 13]
    assert batch.layout.lengths == (4, 3, 8, 5) and batch.layout.cu_seqlens.tolist() == [0, 4, 7, 15, 20]
    assert batch.layout.positions.tolist() == [*range(4), *range(3), *range(8), *range(5)]
    assert (batch.num_sequences, batch.num_tokens) == (2, 7)


def test_a_full_pack_has_no_filler():
    batch = PackedBatch.pack(np.arange(8), np.array([5, 3]), tokens=8, pad_id=1, max_length=8)
    assert batch.layout.lengths == (5, 3)


def test_too_many_tokens_is_an_error():
    with pytest.raises(ValueError, match="9 tokens do not fit into a pack of 8"):
        PackedBatch.pack(np.arange(9), np.array([9]), tokens=8, pad_id=1, max_length=9)


def test_to_moves_every_tensor():
    batch = PackedBatch.pack(np.arange(3), np.array([3]), tokens=4, pad_id=1, max_length=4)
    batch.targets = batch.target_positions = torch.tensor([0])
    moved = batch.to("meta")
    tensors = [moved.ids, moved.layout.cu_seqlens, moved.layout.positions, moved.targets, moved.target_positions]
    assert all(t.is_meta for t in tensors)
