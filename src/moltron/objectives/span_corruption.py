"""T5's span corruption: pieces of a sequence become sentinels, and the decoder writes what stood there.

    residues ──spans──> encoder: A B <0> F G <1> …    labels: <0> C D E <1> H … <eos>

`mean_span` > 1: round(density · L) tokens in round(that / mean_span) spans, cut at random, with at least one token
before each (Raffel et al. 2020, arXiv:1910.10683, their `random_spans_noise_mask`). `mean_span` = 1 is BioNeMo v1's
ProtT5nv: max(1, round(density · L)) tokens, each a span of its own even beside another (spec models.md §4).
Lengths follow from L alone. Knows nothing of where sequences come from.

Σ tokens of all sequences of a pack, B sequences, N records
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moltron.common import rng
from moltron.config.schema import ObjectiveConfig
from moltron.models.batch import PackedBatch
from moltron.objectives.streams import Limits, Objective, smallest, surround, two_streams, within

_NOISE, _KEPT = 0, 1  # counters below a position's own bits


class SpanCorruption(Objective):
    streams = 2

    @staticmethod
    def problems(config: ObjectiveConfig, tokenizer: Any) -> list[str]:
        problems = []
        if not len(tokenizer.sentinel_ids):
            problems.append(f"objective.name=span_corruption: the vocabulary of {tokenizer.name} has no sentinels")
        if not 0 < config.density < 1:
            problems.append(f"objective.density={config.density} must lie between 0 and 1")
        if config.mean_span < 1:
            problems.append(f"objective.mean_span={config.mean_span} must be at least 1")
        return problems

    def counts(self, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) tokens that are taken out of each sequence, and (N,) in how many spans."""
        lengths = np.asarray(lengths_N, dtype=np.int64)
        noise = np.maximum(1, np.rint(self.config.density * lengths).astype(np.int64))
        if self.config.mean_span == 1:
            return noise, noise
        noise = np.clip(noise, 1, np.maximum(lengths - 1, 1))
        spans = np.maximum(1, np.rint(noise / self.config.mean_span).astype(np.int64))
        return noise, np.minimum(spans, np.maximum(lengths - noise, 1))

    def lengths(self, lengths_N: np.ndarray, records_N: np.ndarray, epoch: int, limits: Limits) -> np.ndarray:
        noise, spans = self.counts(lengths_N)
        return np.stack([lengths_N - noise + spans + self.tokenizer.num_specials, noise + spans + 1])

    def max_residues(self, limits: Limits) -> int:
        """Also as many as there are sentinels for."""
        assert limits.decoder is not None
        sizes = np.arange(1, 2 * limits.encoder + 1)
        encoder, decoder = self.lengths(sizes, sizes, 0, limits)
        sentinels = self.counts(sizes)[1] <= len(self.tokenizer.sentinel_ids)
        fits = sizes[(encoder <= limits.encoder) & (decoder <= limits.decoder) & sentinels]
        return int(fits.max(initial=0))

    def batch(self, ids, lengths, records, epoch, *, tokens, limits, targets=None) -> PackedBatch:
        assert targets is None, "span corruption predicts what it takes out"
        t = self.tokenizer
        noise, spans = self.counts(lengths)
        is_noise, starts = self._spans(lengths, records, epoch, noise, spans)
        sequence = np.repeat(np.arange(len(lengths)), lengths)
        number = np.cumsum(starts) - 1 - (np.cumsum(spans) - spans)[sequence]  # of a span's tokens, in its sequence
        seen, written = (self._stream(ids, kept, starts, number) for kept in (~is_noise, is_noise))
        sizes = lengths - noise + spans, noise + spans
        encoder = surround(seen, sizes[0], t.prefix, t.suffix), sizes[0] + t.num_specials
        labels = surround(written, sizes[1], (), (t.eos_id,)), sizes[1] + 1
        return two_streams(encoder, labels, records, tokenizer=t, tokens=tokens, limits=limits)

    def _stream(self, ids: np.ndarray, kept: np.ndarray, starts: np.ndarray, number: np.ndarray) -> np.ndarray:
        """The kept tokens, and in the place of each span, or before it, its sentinel."""
        at = np.flatnonzero(starts)
        before = np.cumsum(kept) - kept  # kept tokens before each place
        return np.insert(ids[kept], before[at], self.tokenizer.sentinel_ids[number[at]])

    def _spans(
        self, lengths: np.ndarray, records: np.ndarray, epoch: int, noise: np.ndarray, spans: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(Σ,) bool: whether a token is taken out; and whether a span begins with it."""
        total = int(lengths.sum())
        states = rng.hash_u64(self.seed, rng.MASK, epoch, records)
        is_noise = np.zeros(total, dtype=bool)
        if self.config.mean_span == 1:
            bits = rng.fold(np.repeat(states, lengths), within(lengths))
            is_noise[smallest(bits, lengths, noise)] = True
            return is_noise, is_noise.copy()
        kept = lengths - noise
        noise_sizes = _cut(noise, spans, rng.fold(states, _NOISE))
        kept_sizes = _cut(kept, spans, rng.fold(states, _KEPT))
        runs = np.column_stack([kept_sizes, noise_sizes]).ravel()  # kept, noise, kept, noise … of every sequence
        is_noise = np.repeat(np.tile([False, True], len(noise_sizes)), runs)
        starts = np.zeros(total, dtype=bool)
        starts[np.cumsum(runs)[1::2] - noise_sizes] = True
        return is_noise, starts


def _cut(items: np.ndarray, parts: np.ndarray, states: rng.U64) -> np.ndarray:
    """Sizes of `parts` non-empty runs that `items` are cut into, all cuts equally likely; (Σ parts,).

    Of no items (a sequence of one token) the one run is empty.
    """
    gaps = np.maximum(items - 1, 0)
    bits = rng.fold(np.repeat(states, gaps), within(gaps))
    chosen = smallest(bits, gaps, parts - 1)
    place = within(gaps)[chosen] + 1  # a cut stands before this item of its sequence
    ends = np.insert(place, np.cumsum(parts - 1), items)
    starts = np.insert(place, np.cumsum(parts - 1) - (parts - 1), 0)
    return ends - starts
