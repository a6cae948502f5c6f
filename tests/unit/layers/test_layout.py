"""Layout: where sequences lie, and the tiles that attention's kernels work through."""

from dataclasses import is_dataclass

import numpy as np
import pytest
import torch

from moltron.layers.layout import TILE, Layout, tile_table


def test_layout_of_lengths():
    layout = Layout.of(np.array([2, 1, 3]))
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 6] and layout.positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert layout.lengths == (2, 1, 3)
    assert layout.sequence_index().tolist() == [0, 0, 1, 2, 2, 2]
    assert layout.tiles.tolist() == [[3, 3, 0, 2], [0, 2, 0, 0], [2, 1, 0, 1]]
    tensors = (layout.cu_seqlens, layout.positions, layout.tiles)
    assert all(x.dtype == torch.int32 for x in tensors)
    moved = layout.each(lambda x: x.to("meta"))
    assert all(x.is_meta for x in (moved.cu_seqlens, moved.positions, moved.tiles)) and moved.lengths == layout.lengths


@pytest.mark.parametrize("block", [TILE, 16])
@pytest.mark.parametrize("lengths", [[5, 0, 64, 65, 128, 1, 65], [300], [1] * 9, [64] * 5, [0, 0]])
def test_tiles_cover_every_token_once_longest_first(lengths, block):
    cu = np.cumsum([0, *lengths])
    tiles = tile_table(cu, block)
    assert tiles.shape == (sum(lengths) // block + len(lengths), 4) and tiles.dtype == np.int32
    real = [tuple(row) for row in tiles.tolist() if row[2] < row[1]]
    sequences = [(start, n, i) for i, (start, n) in enumerate(zip(cu.tolist(), lengths))]
    expected = [(start, n, first, i) for start, n, i in sequences for first in range(0, n, block)]
    assert sorted(real) == sorted(expected)
    assert [row[1] for row in real] == sorted((row[1] for row in real), reverse=True)


def test_fsdp2_walks_through_no_lengths():
    """torch 2.13 looks for gradients in dataclasses, tuples, lists and dictionaries, twice a block: 5 ms of 1,500."""
    layout = Layout.of(np.array([2, 1]))
    assert not is_dataclass(layout) and not isinstance(layout, tuple | list | dict)
    other = layout.but(offsets=(1, 0))
    assert other.offsets == (1, 0) and layout.offsets is None and other.tiles is layout.tiles
