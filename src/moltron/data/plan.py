"""Which record goes where: the order of an epoch, the crops, and the bins of T tokens.

    0 … N−1 ──Permutation(seed, epoch)──> order ──cut──> windows of records ──crop──> lengths ──pack──> bins of T tokens

Everything is a pure function of (seed, epoch, index): a bin is found again from its position (epoch, window, bin)
alone, and no rank needs to know of another. Where the store has clusters and the plan uses them, an epoch is one pass
over the clusters, and the member drawn is a function of (seed, epoch, cluster).

Windows of an epoch hold equally many records (to within one), at most `window` of them; bins never cross a window.
Fill is Σ lengths / (bins · T): ≥ 98 % from about 50 bins a window and T ≥ 4 · max_length on; a tiny data set, whose
epoch is n times T long, needs ⌈n⌉ bins and fills them evenly to n / ⌈n⌉. Knows nothing of bytes, ids and masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moltron.common import rng
from moltron.data.store import Store

I64 = NDArray[np.int64]
EVALUATION_SEED = 0


@dataclass(frozen=True, eq=False)
class Bin:
    """The sequences of one pack, longest first: of records[i] the residues crops[i] … crops[i] + lengths[i] − 1."""

    records: I64
    crops: I64
    lengths: I64  # residues, without specials


class Position(NamedTuple):
    """The next bin of the stream."""

    epoch: int = 0
    window: int = 0
    bin: int = 0


class BatchPlan:
    """An endless stream of bins over one split.

    store: lengths, clusters and fingerprint are read, no sequences.
    tokens: T, what a bin holds at most. max_length: tokens of a sequence at most, specials included; longer records
        are cropped, each start in [0, L − crop] equally likely.
    window: records packed together. clusters: draw clusters, then members, where the store has clusters.
    shuffle: False keeps the store's order (of windows; within a window, packing mixes).
    """

    def __init__(
        self,
        store: Store,
        tokens: int,
        max_length: int,
        num_specials: int = 2,
        window: int = 65536,
        seed: int = 0,
        clusters: bool = True,
        shuffle: bool = True,
    ):
        problems = []
        if max_length <= num_specials:
            problems.append(f"data.max_length={max_length} leaves no room beside {num_specials} specials: raise it")
        if tokens < max_length:
            problems.append(
                f"batch.tokens={tokens} < data.max_length={max_length}: raise batch.tokens or lower data.max_length"
            )
        if window < 1:
            problems.append(f"data.window={window}: at least 1 record is needed")
        if len(store) == 0:
            problems.append("the data set has no records: prepare it again")
        if problems:
            raise ValueError("; ".join(problems))
        self.store, self.tokens, self.max_length, self.num_specials = store, tokens, max_length, num_specials
        self.seed, self.shuffle = seed, shuffle
        self.clusters = store.clusters if clusters else None
        self.num_items = len(store) if self.clusters is None else len(self.clusters.count)  # records or clusters
        self.num_windows = -(-self.num_items // window)
        drawn = self.clusters is not None
        identity = (store.fingerprint, tokens, max_length, num_specials, window, seed, drawn, shuffle)
        self.fingerprint = sha256(repr(identity).encode()).hexdigest()[:16]

    @classmethod
    def evaluation(cls, store: Store, tokens: int, max_length: int, num_specials: int = 2) -> BatchPlan:
        """All records once, in the store's order, crops by the evaluation seed; use it for one epoch."""
        return cls(store, tokens, max_length, num_specials, seed=EVALUATION_SEED, clusters=False, shuffle=False)

    def dump(self, position: Position) -> dict[str, Any]:
        """A position for JSON, with the plan's fingerprint to guard it."""
        return {**position._asdict(), "plan": self.fingerprint}

    def load(self, saved: dict[str, Any] | None) -> Position:
        """The position in a dict of `dump`, None being the beginning; ValueError if another plan dumped it."""
        if saved is None:
            return Position()
        if saved["plan"] != self.fingerprint:
            raise ValueError(
                "the saved place in the data belongs to another plan: the data, train.seed, batch.tokens, "
                "data.max_length, data.window and data.clusters must be those the run was started with"
            )
        return Position(saved["epoch"], saved["window"], saved["bin"])

    def window(self, epoch: int, w: int) -> list[Bin]:
        """The bins of window w of an epoch, in their final, hashed order."""
        records = self.order(epoch, w)
        lengths = np.asarray(self.store.lengths[records], dtype=np.int64)
        room = self.max_length - self.num_specials
        crops = np.zeros(len(records), dtype=np.int64)
        long = np.flatnonzero(lengths > room)
        starts = lengths[long] - room + 1  # this many, so that the last one reaches the end
        crops[long] = rng.bounded(rng.hash_u64(self.seed, rng.CROP, epoch, records[long]), starts)
        lengths[long] = room
        packs = pack_lengths(lengths + self.num_specials, self.tokens)
        order = np.argsort(rng.hash_u64(self.seed, rng.BINS, epoch, w, np.arange(len(packs))))
        return [Bin(records[items], crops[items], lengths[items]) for items in (packs[b] for b in order)]

    def order(self, epoch: int, w: int) -> I64:
        """The records of window w, in the epoch's order, before packing."""
        n, count = self.num_items, self.num_windows
        items = np.arange(n * w // count, n * (w + 1) // count)
        if self.shuffle:
            items = rng.Permutation(n, self.seed, epoch)[items]
        if self.clusters is None:
            return items
        member = rng.bounded(rng.hash_u64(self.seed, rng.MEMBER, epoch, items), self.clusters.count[items])
        return np.asarray(self.clusters.order[self.clusters.start[items] + member], dtype=np.int64)

    def bins(self, position: Position, epochs: int | None = None) -> Iterator[tuple[int, Bin, Position]]:
        """From `position` on: (epoch, bin, position of the next bin); up to epoch `epochs`, or without end."""
        epoch, w, b = position
        while epochs is None or epoch < epochs:
            bins = self.window(epoch, w)
            following = Position(epoch, w + 1) if w + 1 < self.num_windows else Position(epoch + 1)
            for i in range(b, len(bins)):
                yield epoch, bins[i], Position(epoch, w, i + 1) if i + 1 < len(bins) else following
            epoch, w, b = following


def pack_lengths(lengths: np.ndarray, tokens: int) -> list[I64]:
    """Indices of `lengths` (each ≤ tokens) in bins of at most `tokens`, evenly filled, longest first within a bin.

    Round after round each bin, the emptiest first, takes the longest sequence left that fits. So bins get alike mixes
    of lengths and differ little in fill. If a sequence is left over, it starts again with more bins.
    """
    if len(lengths) == 0:
        return []
    order = np.argsort(lengths, kind="stable")
    ascending = np.asarray(lengths, dtype=np.int64)[order]
    if ascending[-1] > tokens:
        raise ValueError(f"a sequence of {ascending[-1]} tokens does not fit into a pack of {tokens}")
    num_bins = -(-int(ascending.sum()) // tokens)
    while True:
        bin_of, left = _deal(ascending, tokens, num_bins)
        if not left.size:
            break
        num_bins += -(-int(ascending[left].sum()) // tokens)
    by_bin = np.argsort(bin_of, kind="stable")[::-1]  # reversed: bins backwards, longest first within each
    counts = np.bincount(bin_of, minlength=num_bins)[::-1]
    return [items for items in np.split(order[by_bin], np.cumsum(counts)[:-1]) if items.size]


def _deal(ascending: I64, tokens: int, num_bins: int) -> tuple[I64, I64]:
    """One attempt of `pack_lengths`: the bin of each sequence, and the sequences for which no room was left."""
    free = np.full(num_bins, tokens, dtype=np.int64)
    bin_of = np.full(len(ascending), -1, dtype=np.int64)
    left = np.arange(len(ascending))
    rank = np.arange(num_bins)
    while left.size:
        bins = np.argsort(-free, kind="stable")[: left.size]
        if free[bins[-1]] >= ascending[left[-1]]:  # everything fits everywhere: the longest to the emptiest
            taken, left = left[-len(bins) :][::-1], left[: -len(bins)]
        else:
            fits = np.searchsorted(ascending[left], free[bins], side="right") - 1
            index = np.minimum.accumulate(fits + rank[: len(bins)]) - rank[: len(bins)]  # no sequence twice
            bins, index = bins[index >= 0], index[index >= 0]
            if not index.size:
                break
            taken, left = left[index], np.delete(left, index)
        bin_of[taken] = bins
        free[bins] -= ascending[taken]
    return bin_of, left
