"""Where the sequences of one packed token axis lie, and how attention divides the work on them.

    lengths ──Layout.of──> cu_seqlens, positions, tiles (host, once a batch) ──.to(device)──> every layer's attention

Knows nothing of tokens, models or kernels.

T tokens (packed), B sequences
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TILE = 64  # tokens of one sequence that one program of an attention kernel takes; the best at every head width


@dataclass(eq=False)
class Share:
    """What a rank of context parallelism holds of a pack: its tokens from `start` to `stop`.

    queries: their layout, with as many sequences as the pack's, most of them empty. gather: this rank's rows → those of
    all tokens, in order, differentiable.
    """

    start: int
    stop: int
    queries: Layout
    gather: Callable[[Tensor], Tensor]


class Layout:
    """Where the sequences of one packed token axis begin and end.

    cu_seqlens: (B+1,) int32, starts at 0, ends at T; filler at the end is a sequence of its own.
    positions: (T,) int32, 0, 1, 2 … within each sequence.
    lengths: the B lengths on the host, so that no path waits for the device.
    tiles: (T // TILE + B, 4) int32, `tile_table`.
    share: where a rank holds only some of the tokens; None: it holds all.
    offsets: of a share's sequences, how many of their tokens other ranks hold that come before; None: none.

    No dataclass: at every block FSDP2 looks for tensors in all fields of those, and in all numbers of a tuple.
    """

    def __init__(self, cu_seqlens: Tensor, positions: Tensor, lengths: tuple[int, ...], tiles: Tensor):
        self.cu_seqlens, self.positions, self.lengths, self.tiles = cu_seqlens, positions, lengths, tiles
        self.share: Share | None = None
        self.offsets: tuple[int, ...] | None = None

    @staticmethod
    def of(lengths: np.ndarray, pin: bool = False) -> Layout:
        """On the host. lengths: (B,) integers, in the order of the pack. pin: in page-locked memory."""
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        positions = np.arange(cu_seqlens[-1], dtype=np.int32) - np.repeat(cu_seqlens[:-1], lengths)
        starts, tokens, tiles = map(torch.from_numpy, (cu_seqlens, positions, tile_table(cu_seqlens)))
        layout = Layout(starts, tokens, tuple(lengths.tolist()), tiles)
        return layout.each(lambda x: x.pin_memory()) if pin else layout

    def but(self, **changes: Any) -> Layout:
        """A copy with these attributes."""
        other = copy(self)
        vars(other).update(changes)
        return other

    def each(self, change: Callable[[Tensor], Tensor]) -> Layout:
        """All tensors changed alike: moved, pinned."""
        return self.but(**{name: change(getattr(self, name)) for name in ("cu_seqlens", "positions", "tiles")})

    def sequence_index(self) -> Tensor:
        """(T,) int64: which sequence each token belongs to."""
        num_tokens = self.positions.shape[0]
        ends = self.cu_seqlens[1:]
        return torch.bucketize(torch.arange(num_tokens, device=ends.device, dtype=ends.dtype), ends, right=True)


def tile_table(cu_seqlens: np.ndarray, block: int = TILE) -> np.ndarray:
    """Cut every sequence into tiles of `block` tokens: (T // block + B, 4) int32, the longest sequence first.

    A row is the first token of the tile's sequence, the sequence's length, the tile's first token counted from the
    sequence's, and which sequence it is: no program has to look for its sequence, and the long ones do not start last.
    By the last of these, attention to another stream finds the sequence in that one's `cu_seqlens`. The number of rows,
    enough for any lengths, follows from T and B alone; those left over are 0: an empty sequence.
    """
    lengths = np.diff(cu_seqlens)
    order = np.argsort(-lengths, kind="stable")
    starts, lengths = cu_seqlens[:-1][order], lengths[order]
    counts = -(-lengths // block)
    ends = np.cumsum(counts)
    num_tiles = int(counts.sum())
    tiles = np.zeros((int(cu_seqlens[-1]) // block + len(lengths), 4), dtype=np.int32)
    tiles[:num_tiles, 0] = np.repeat(starts, counts)
    tiles[:num_tiles, 1] = np.repeat(lengths, counts)
    tiles[:num_tiles, 2] = (np.arange(num_tiles) - np.repeat(ends - counts, counts)) * block
    tiles[:num_tiles, 3] = np.repeat(order, counts)
    return tiles
