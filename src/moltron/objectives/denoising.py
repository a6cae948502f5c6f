"""MegaMolBART's objective: the encoder reads a molecule with masked spans, the decoder writes the whole molecule.

    C C ( = O ) O c 1 … ──walk──> encoder: C <MASK> O c 1 …      labels: C C ( = O ) O c 1 … <end>

The walk of MolBART (Irwin et al. 2022; spec models.md §4): at a token a span starts with probability `mask_prob`, drawn
once a token; its length is Poisson(mean_span); the whole span becomes one mask. A length of 0 puts a mask before the
token and draws a length again. The decoder's molecule may be another SMILES of the same molecule
(`decoder_smiles`). Knows nothing of chemistry.

Σ tokens of all sequences, B sequences, N records
"""

from __future__ import annotations

from math import exp
from typing import Any, NamedTuple

import numpy as np

from moltron.common import rng
from moltron.config.schema import ObjectiveConfig
from moltron.models.batch import PackedBatch
from moltron.objectives.streams import Limits, Objective, surround, two_streams, within

LONGEST = 64  # of a span: beyond, Poisson(3) has a probability of 1e-52
CHOICES = {"encoder_smiles": ("random", "canonical"), "decoder_smiles": ("same", "canonical", "random")}


class _Masks(NamedTuple):
    """at: (K,) token before which masks stand, counted over all sequences; masks: (K,) how many; covered: (K,) how many
    tokens from `at` on they replace."""

    at: np.ndarray
    masks: np.ndarray
    covered: np.ndarray


class Denoising(Objective):
    streams = 2
    crops = False  # half a molecule is none
    reconstructs = True

    def __init__(self, config: ObjectiveConfig, tokenizer: Any, seed: int):
        super().__init__(config, tokenizer, seed)
        self.encoder_rows, self.decoder_rows = config.encoder_smiles, config.decoder_smiles
        self._start = rng.threshold(config.mask_prob)
        ratios = config.mean_span / np.arange(1, LONGEST)  # of the probability of a length to that of the one before
        upto = np.cumsum(np.cumprod([exp(-config.mean_span), *ratios]))
        bounds = [rng.threshold(min(probability, 1.0)) for probability in upto]
        self._bounds = np.array(bounds, dtype=np.uint64)  # a length is how many of them its bits reach

    @staticmethod
    def problems(config: ObjectiveConfig, tokenizer: Any) -> list[str]:
        problems = [
            f"objective.{key}={getattr(config, key)} must be {' or '.join(known)}"
            for key, known in CHOICES.items()
            if getattr(config, key) not in known
        ]
        if tokenizer.mask_id is None:
            problems.append(f"objective.name=denoising: the vocabulary of {tokenizer.name} has no mask")
        if not 0 <= config.mask_prob < 1:
            problems.append(f"objective.mask_prob={config.mask_prob} must lie in [0, 1)")
        if not 0 < config.mean_span <= 16:
            problems.append(f"objective.mean_span={config.mean_span} must be greater than 0 and at most 16")
        return problems

    def max_residues(self, limits: Limits) -> int:
        assert limits.decoder is not None
        return min(limits.encoder, limits.decoder - 1)

    def lengths(self, lengths_N: np.ndarray, records_N: np.ndarray, epoch: int, limits: Limits) -> np.ndarray:
        """Of the decoder as if it read the same SMILES: the plan adds the difference where it does not."""
        masks = self._walk(lengths_N, records_N, epoch)
        ends = np.cumsum(lengths_N)
        gained = np.zeros(len(lengths_N), dtype=np.int64)
        np.add.at(gained, np.searchsorted(ends, masks.at, side="right"), masks.masks - masks.covered)
        encoder = np.minimum(lengths_N + gained, limits.encoder)
        return np.stack([encoder, np.asarray(lengths_N, dtype=np.int64) + 1])

    def batch(self, ids, lengths, records, epoch, *, tokens, limits, targets=None) -> PackedBatch:
        t = self.tokenizer
        masks = self._walk(lengths, records, epoch)
        covered = np.repeat(masks.at, masks.covered) + within(masks.covered)
        times = np.ones(len(ids), dtype=np.int64)  # how often the encoder reads each token
        times[covered] = 0
        times[masks.at] = masks.masks
        seen = ids.copy()
        seen[masks.at] = t.mask_id
        sizes = np.add.reduceat(times, np.cumsum(lengths) - lengths) if len(lengths) else lengths
        seen = np.repeat(seen, times)
        if sizes.max(initial=0) > limits.encoder:
            seen = seen[within(sizes) < limits.encoder]
            sizes = np.minimum(sizes, limits.encoder)
        wanted, wanted_lengths = (ids, lengths) if targets is None else targets
        labels = surround(wanted, wanted_lengths, (), (t.eos_id,)), wanted_lengths + 1
        return two_streams((seen, sizes), labels, records, tokenizer=t, tokens=tokens, limits=limits)

    def _walk(self, lengths: np.ndarray, records: np.ndarray, epoch: int) -> _Masks:
        """All sequences side by side, one span of each a round."""
        lengths = np.asarray(lengths, dtype=np.int64)
        ends = np.cumsum(lengths)
        states = rng.hash_u64(self.seed, rng.MASK, epoch, records)
        bits = rng.fold(np.repeat(states, lengths), within(lengths))
        candidates = np.flatnonzero(bits < self._start)  # where a span starts, if the walk comes there
        masks, covered = self._draw(bits[candidates])
        place, end = ends - lengths, ends
        found = []
        while len(place):
            which = np.searchsorted(candidates, place)
            inside = which < len(candidates)
            inside[inside] = candidates[which[inside]] < end[inside]
            which, end = which[inside], end[inside]
            found.append(which)
            place = candidates[which] + covered[which]
            further = place < end
            place, end = place[further], end[further]
        chosen = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        at = candidates[chosen]
        room = ends[np.searchsorted(ends, at, side="right")] - at
        return _Masks(at, masks[chosen], np.minimum(covered[chosen], room))

    def _draw(self, bits: rng.U64) -> tuple[np.ndarray, np.ndarray]:
        """Masks and tokens covered of the spans that start at tokens with these bits: 0 draws again, one mask more."""
        masks, covered = np.ones(len(bits), dtype=np.int64), np.zeros(len(bits), dtype=np.int64)
        left, draw = np.arange(len(bits)), 1
        while len(left):
            covered[left] = np.searchsorted(self._bounds, rng.fold(bits[left], draw), side="right")
            left = left[covered[left] == 0]
            masks[left] += 1
            draw += 1
        return masks, covered
