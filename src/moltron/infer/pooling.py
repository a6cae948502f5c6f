"""One vector a sequence from the hidden states of a pack, on the device that computed them.

    hidden (T, D) ──sum | max over each piece's kept rows, first row──> (B, D) fp32 ──merge──> one vector a sequence

Each piece is reduced over its own rows, one after another, so a vector has the same bits whatever else is in the pack.
A sequence cut into windows has several pieces: their sums are added in order, then divided by the residues.

T tokens (packed), B pieces, D width
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

POOLINGS = ("mean", "cls", "max")


def segment_lengths(lengths: np.ndarray, keep: np.ndarray, tokens: int) -> np.ndarray:
    """Cut a pack of `tokens` rows into gap, piece, gap, piece, … gap: (2B+1,) row counts.

    lengths: (B,) tokens of each piece; keep: (B, 2) the kept rows [from, to) within each.
    """
    starts = np.cumsum(lengths) - lengths
    edges = np.concatenate([[0], (starts[:, None] + keep).ravel(), [tokens]])
    return np.diff(edges)


def pool(hidden_TD: Tensor, segments: Tensor, starts: Tensor, pooling: str) -> Tensor:
    """(B, D) fp32: sums for `mean` (merge divides), maxima for `max`, first rows for `cls`.

    segments: (2B+1,) from `segment_lengths`; starts: (B,) int64, the row at which each piece begins.
    """
    if pooling == "cls":
        return hidden_TD.index_select(0, starts).float()
    reduce = {"mean": "sum", "max": "max"}[pooling]
    return torch.segment_reduce(hidden_TD.float(), reduce, lengths=segments, axis=0, unsafe=True)[1::2]


def merge(pooled: np.ndarray, kept: np.ndarray, owners: np.ndarray, pooling: str) -> np.ndarray:
    """One vector a sequence from the vectors of its pieces.

    pooled: (P, D) of `pool`; kept: (P,) rows of each piece; owners: (P,) index of its sequence, ascending, no gaps.
    mean: Σ sums / Σ rows. max: the largest. cls: mean over the pieces' first tokens.
    """
    first = np.flatnonzero(np.diff(owners, prepend=-1))
    if pooling == "max":
        return pooled if len(first) == len(owners) else np.maximum.reduceat(pooled, first, axis=0)
    weights = kept if pooling == "mean" else np.ones_like(kept)
    if len(first) != len(owners):
        pooled, weights = np.add.reduceat(pooled, first, axis=0), np.add.reduceat(weights, first)
    return pooled / weights[:, None].astype(np.float32)
