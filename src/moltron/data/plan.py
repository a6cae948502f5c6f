"""Which record goes where: the order of an epoch, the crops, and the bins of T tokens.

    0 … N−1 ──Permutation(seed, epoch)──> order ──cut──> windows of records ──crop──> lengths ──pack──> bins of T tokens
                                                        objective.lengths: tokens of each stream ──┘

Everything is a pure function of (seed, epoch, index): a bin is found again from its position (epoch, window, bin)
alone, and no rank needs to know of another. Where the store has clusters and the plan uses them, an epoch is one pass
over the clusters, and the member drawn is a function of (seed, epoch, cluster). A molecule's cluster holds its
canonical SMILES first, then random ones; the objective says which of them each stream reads.

Windows of an epoch hold equally many records (to within one), at most `window` of them; bins never cross a window.
Fill is Σ lengths / (bins · T): ≥ 98 % from about 50 bins a window and T ≥ 4 · max_length on; a tiny data set, whose
epoch is n times T long, needs ⌈n⌉ bins and fills them evenly to n / ⌈n⌉. With two streams that holds for the one that
fills its budget first. Knows nothing of bytes, ids and masks.
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
from moltron.objectives import Limits, Objective

I64 = NDArray[np.int64]
EVALUATION_SEED = 0
SINGLY = 64  # rounds of `_deal` that look at every bin's room; the many before them are dealt at once


@dataclass(frozen=True, eq=False)
class Bin:
    """The sequences of one pack, longest first: of records[i] the residues crops[i] … crops[i] + lengths[i] − 1.

    targets: the records that the decoder is to write, where these are others.
    """

    records: I64
    crops: I64
    lengths: I64  # residues, without specials
    targets: I64 | None = None


class Position(NamedTuple):
    """The next bin of the stream."""

    epoch: int = 0
    window: int = 0
    bin: int = 0


class BatchPlan:
    """An endless stream of bins over one split.

    store: lengths, clusters, alphabet and fingerprint are read, no sequences.
    objective: how many tokens a record takes of each stream, and which of a molecule's SMILES each reads.
    tokens: T, or (T, U), what a bin holds at most. limits: tokens of a sequence at most; longer records are cropped,
        each start in [0, L − crop] equally likely.
    window: records packed together. clusters: draw clusters, then members, where the store has clusters.
    shuffle: False keeps the store's order (of windows; within a window, packing mixes).
    Raises ValueError naming every problem, e.g. molecules that are too long.
    """

    def __init__(
        self,
        store: Store,
        objective: Objective,
        tokens: tuple[int, ...],
        limits: Limits,
        window: int = 65536,
        seed: int = 0,
        clusters: bool = True,
        shuffle: bool = True,
    ):
        self.store, self.objective, self.tokens, self.limits = store, objective, tokens, limits
        self.seed, self.shuffle = seed, shuffle
        self.room = objective.max_residues(limits)
        problems = self._problems(clusters)
        if problems:
            raise ValueError("; ".join(problems))
        self.clusters = store.clusters if clusters else None
        self.num_items = len(store) if self.clusters is None else len(self.clusters.count)  # records or clusters
        self.num_windows = -(-self.num_items // window)
        learned, drawn = (objective.config, objective.seed), self.clusters is not None
        identity = (store.fingerprint, tokens, limits, self.room, window, seed, drawn, shuffle, learned)
        self.fingerprint = sha256(repr(identity).encode()).hexdigest()[:16]

    def _problems(self, clusters: bool) -> list[str]:
        limits, problems = self.limits, []
        rows = self.objective.encoder_rows, self.objective.decoder_rows
        if self.store.clusters is not None and not clusters and rows != ("random", "same"):
            problems.append(
                f"objective.encoder_smiles={rows[0]}, decoder_smiles={rows[1]} choose among a molecule's SMILES, which "
                "data.clusters=false takes one by one: set data.clusters=true"
            )
        if self.room < 1:
            problems.append(f"data.max_length={limits.encoder} leaves no room beside the special tokens: raise it")
        if len(self.store) == 0:
            problems.append("the data set has no records: prepare it again")
        elif not self.objective.crops and self.room > 0 and int(self.store.lengths.max()) > self.room:
            long, most = np.count_nonzero(self.store.lengths > self.room), int(self.store.lengths.max())
            problems.append(
                f"{long:,} of {len(self.store):,} records have more than {self.room} tokens (up to {most}) and cannot "
                f"be cropped: prepare the data again with max_length={self.room}, or raise data.max_length"
            )
        return problems

    @classmethod
    def evaluation(cls, store: Store, objective: Objective, tokens: tuple[int, ...], limits: Limits) -> BatchPlan:
        """All records once, in the store's order, crops by the evaluation seed; use it for one epoch.

        Of molecules each once, not each of its SMILES.
        """
        molecules = store.alphabet == "molecule"
        return cls(store, objective, tokens, limits, seed=EVALUATION_SEED, clusters=molecules, shuffle=False)

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
                "batch.decoder_tokens, data.max_length, data.decoder_max_length, data.window and data.clusters must be "
                "those the run was started with"
            )
        return Position(saved["epoch"], saved["window"], saved["bin"])

    def window(self, epoch: int, w: int) -> list[Bin]:
        """The bins of window w of an epoch, in their final, hashed order."""
        records, targets = self.order(epoch, w)
        lengths = np.asarray(self.store.lengths[records], dtype=np.int64)
        crops = np.zeros(len(records), dtype=np.int64)
        long = np.flatnonzero(lengths > self.room)
        starts = lengths[long] - self.room + 1  # this many, so that the last one reaches the end
        crops[long] = rng.bounded(rng.hash_u64(self.seed, rng.CROP, epoch, records[long]), starts)
        lengths[long] = self.room
        sizes = self.objective.lengths(lengths, records, epoch, self.limits)
        if targets is not None:
            sizes[1] += self.store.lengths[targets] - lengths
        packs = pack_lengths(sizes, self.tokens)
        order = np.argsort(rng.hash_u64(self.seed, rng.BINS, epoch, w, np.arange(len(packs))))
        return [
            Bin(records[items], crops[items], lengths[items], None if targets is None else targets[items])
            for items in (packs[b] for b in order)
        ]

    def order(self, epoch: int, w: int) -> tuple[I64, I64 | None]:
        """The records of window w, in the epoch's order, before packing; and those the decoder writes, if others."""
        n, count = self.num_items, self.num_windows
        items = np.arange(n * w // count, n * (w + 1) // count)
        if self.shuffle:
            items = rng.Permutation(n, self.seed, epoch)[items]
        if self.clusters is None:
            return items, None
        records = self._members(items, epoch, self.objective.encoder_rows, rng.MEMBER)
        if self.objective.decoder_rows == "same":
            return records, None
        return records, self._members(items, epoch, self.objective.decoder_rows, rng.TARGET)

    def _members(self, items: I64, epoch: int, which: str, stream: int) -> I64:
        """A record of each cluster; of a molecule's, "random" is any but the first, unless that is all."""
        assert self.clusters is not None
        count = self.clusters.count[items]
        member = np.zeros(len(items), dtype=np.int64)
        if which == "random":
            first = (count > 1) & (self.store.alphabet == "molecule")
            member = first + rng.bounded(rng.hash_u64(self.seed, stream, epoch, items), count - first)
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


def pack_lengths(lengths: np.ndarray, tokens: tuple[int, ...]) -> list[I64]:
    """Indices of N sequences in bins of at most `tokens`, evenly filled, longest first within a bin.

    lengths: (S, N), the tokens that each takes of each stream, at most tokens[s] of it.
    The stream that is fullest over all is dealt out: round after round each bin, the emptiest first, takes the longest
    sequence left that fits. So bins get alike mixes of lengths and differ little in fill, also in the other stream. If
    a sequence is left over, or the other stream overflows, it starts again with more bins.
    """
    if lengths.shape[1] == 0:
        return []
    for longest, budget in zip(lengths.max(1), tokens):
        if longest > budget:
            raise ValueError(f"a sequence of {longest} tokens does not fit into a pack of {budget}")
    main = int((lengths.sum(1) / tokens).argmax())
    order = np.argsort(lengths[main], kind="stable")
    ascending = np.asarray(lengths[main][order], dtype=np.int64)
    num_bins = -(-int(ascending.sum()) // tokens[main])
    while True:
        bin_of, left = _deal(ascending, tokens[main], num_bins)
        more = -(-int(ascending[left].sum()) // tokens[main])
        if not more:
            for row, budget in zip(lengths, tokens):
                loads = np.bincount(bin_of, weights=row[order], minlength=num_bins)
                more = max(more, -(-int(np.maximum(loads - budget, 0).sum()) // budget))
        if not more:
            break
        num_bins += more
    by_bin = np.argsort(bin_of, kind="stable")[::-1]  # reversed: bins backwards, longest first within each
    counts = np.bincount(bin_of, minlength=num_bins)[::-1]
    return [items for items in np.split(order[by_bin], np.cumsum(counts)[:-1]) if items.size]


def _deal(ascending: I64, tokens: int, num_bins: int) -> tuple[I64, I64]:
    """One attempt of `pack_lengths`: the bin of each sequence, and the sequences for which no room was left."""
    free = np.full(num_bins, tokens, dtype=np.int64)
    bin_of = np.full(len(ascending), -1, dtype=np.int64)
    left = np.arange(len(ascending))
    rounds = len(ascending) // num_bins - SINGLY
    if rounds > 0:  # all but the last rounds at once: over the bins and back
        dealt = left[::-1][: rounds * num_bins].reshape(rounds, num_bins)
        dealt[1::2] = dealt[1::2, ::-1].copy()
        loads = ascending[dealt].sum(0)
        if loads.max() <= tokens:
            bin_of[dealt] = np.arange(num_bins)
            free, left = free - loads, left[: -dealt.size]
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
