"""Masked language modelling: some residues become targets, and most of those are hidden from the model.

    ids ──specials, pack──> PackedBatch (true ids) ──corrupt──> PackedBatch (seen ids, targets)

Which residues, and what becomes of them, is a pure function of (seed, epoch, record, position), the position being
counted in the sequence as it stands in the batch (after cropping, the leading special is 0): never of the pack, the
rank or the number of ranks. Specials are neither chosen nor drawn. Knows nothing of where batches come from.

T tokens in a batch, B sequences, M target positions, V vocabulary
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, sqrt
from typing import Any

import numpy as np
import torch

from moltron.common import rng
from moltron.config.schema import ObjectiveConfig
from moltron.layers.losses import IGNORE
from moltron.models.batch import PackedBatch
from moltron.objectives.streams import QUANTUM, Limits, Objective, smallest, surround

_NEVER = np.uint64(2**64 - 1)
_ACTION, _LETTER = 1, 2  # counters below a residue's own bits


class MaskedLM(Objective):
    """BERT's objective on residues (Devlin et al. 2019; ESM-2: 15 %, of these 80 % masked, 10 % random, 10 % kept).

    config.count "bernoulli": each residue is chosen by itself with probability `select`; where a sequence would be
        left without a target, the residue closest to being chosen becomes one.
    config.count "floor": exactly ⌊select · residues⌋ of each sequence. BioNeMo v1 is select .1, mask .5, random .5.
    A random residue is one of the 20 standard amino acids, and never the true one.
    tokenizer: `mask_id`, `special_ids`, `residue_ids`, `vocab_size` are used.
    """

    @staticmethod
    def problems(config: ObjectiveConfig, tokenizer: Any) -> list[str]:
        problems = []
        if tokenizer.mask_id is None:
            problems.append(f"objective.name=masked_lm: the vocabulary of {tokenizer.name} has no mask")
        if not 0 < config.select <= 1:
            problems.append(f"objective.select={config.select} must be in (0, 1]")
        if min(config.mask, config.random) < 0 or config.mask + config.random > 1 + 1e-9:
            problems.append(f"objective.mask={config.mask} and random={config.random} must be shares of at most 1")
        if config.count not in ("bernoulli", "floor"):
            problems.append(f"objective.count={config.count!r} must be bernoulli or floor")
        return problems

    def __init__(self, config: ObjectiveConfig, tokenizer: Any, seed: int):
        super().__init__(config, tokenizer, seed)
        self.mask_id = tokenizer.mask_id
        self._select = rng.threshold(config.select)
        self._mask, self._random = rng.threshold(config.mask), rng.threshold(config.mask + config.random)
        self._forbidden = np.zeros(tokenizer.vocab_size, dtype=np.uint64)  # ORed to a token's bits: never the smallest
        self._forbidden[list(tokenizer.special_ids)] = _NEVER
        self._residues = np.array(tokenizer.residue_ids, dtype=np.int64)
        self._rank = np.full(tokenizer.vocab_size, -1, dtype=np.int64)  # place in `_residues`, -1: not in there
        self._rank[self._residues] = np.arange(len(self._residues))

    def max_residues(self, limits: Limits) -> int:
        return limits.encoder - self.tokenizer.num_specials

    def lengths(self, lengths_N: np.ndarray, records_N: np.ndarray, epoch: int, limits: Limits) -> np.ndarray:
        return (lengths_N + self.tokenizer.num_specials)[None]

    def batch(self, ids, lengths, records, epoch, *, tokens, limits, targets=None) -> PackedBatch:
        assert targets is None, "a masked language model predicts what it reads"
        t = self.tokenizer
        whole = PackedBatch.pack(
            surround(ids, lengths, t.prefix, t.suffix),
            lengths + t.num_specials,
            tokens=tokens[0],
            pad_id=t.pad_id,
            max_length=limits.encoder,
            records=records,
        )
        return self.corrupt(whole, epoch)

    def corrupt(self, batch: PackedBatch, epoch: int) -> PackedBatch:
        """Choose targets and hide them; `batch` itself stays as it is.

        target_positions and targets get a length M that depends on T only (a rare batch with more targets gets a
        multiple of it), filled up with position 0 and target -100.
        """
        count, num_sequences = batch.num_tokens, batch.num_sequences
        ids = batch.ids.numpy()[:count]
        where, bits = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint64)
        if num_sequences:
            lengths = np.array(batch.layout.lengths[:num_sequences])
            states = rng.hash_u64(self.seed, rng.MASK, epoch, batch.records)
            bits = rng.fold(np.repeat(states, lengths), batch.layout.positions.numpy()[:count])
            bits |= self._forbidden[ids]
            where = self._choose_floor(bits, lengths) if self.config.count == "floor" else self._choose(bits, lengths)
            bits = bits[where]
        corrupted = batch.ids.numpy().copy()  # not torch's clone, which would wake a pool of threads
        corrupted[where] = self._replace(ids[where], bits)
        size = self.num_targets(len(corrupted), len(where))
        positions, targets = np.zeros(size, dtype=np.int64), np.full(size, IGNORE, dtype=np.int64)
        positions[: len(where)], targets[: len(where)] = where, ids[where]
        return replace(
            batch,
            ids=torch.from_numpy(corrupted),
            target_positions=torch.from_numpy(positions),
            targets=torch.from_numpy(targets),
        )

    def num_targets(self, tokens: int, needed: int = 0) -> int:
        """M for packs of `tokens`: ten standard deviations above the mean, or the multiple of that which is needed."""
        mean = self.config.select * tokens
        size = QUANTUM * ceil((mean + 10 * sqrt(mean * (1 - self.config.select))) / QUANTUM)
        return size * max(1, ceil(needed / size))

    def _choose(self, bits: rng.U64, lengths: np.ndarray) -> np.ndarray:
        lowest = np.minimum.reduceat(bits, np.cumsum(lengths) - lengths)
        if (lowest < self._select).all():
            return np.flatnonzero(bits < self._select)
        limit = np.where(lowest == _NEVER, 0, np.maximum(lowest + np.uint64(1), self._select))  # NEVER: only specials
        return np.flatnonzero(bits < np.repeat(limit, lengths))

    def _choose_floor(self, bits: rng.U64, lengths: np.ndarray) -> np.ndarray:
        free = np.flatnonzero(bits != _NEVER)
        available = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[free], minlength=len(lengths))
        wanted = np.floor(self.config.select * available + 1e-9).astype(np.int64)  # .29 · 100 is 29
        return free[smallest(bits[free], available, wanted)]

    def _replace(self, ids: np.ndarray, bits: rng.U64) -> np.ndarray:
        """What the model sees in place of the chosen `ids`."""
        action = rng.fold(bits, _ACTION)
        seen = np.where(action < self._mask, self.mask_id, ids)
        drawn = np.flatnonzero((action >= self._mask) & (action < self._random))
        rank, n = self._rank[ids[drawn]], len(self._residues)
        step = rng.bounded(rng.fold(bits[drawn], _LETTER), np.where(rank >= 0, n - 1, n))  # 1 … n−1 places further on
        seen[drawn] = self._residues[(rank + 1 + step) % n]
        return seen
