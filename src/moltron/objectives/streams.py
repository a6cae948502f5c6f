"""What every objective is to the plan, the loader and the training step; and pieces that they share.

    (lengths of records) ──lengths──> tokens of each stream ──plan──> which records make a pack
    (ids of a pack's records) ──batch──> PackedBatch with targets ──model──> Output ──loss──> (sum, count)

Both are pure functions of (seed, epoch, record, position): never of the pack, the rank or the number of ranks.

T tokens in a batch (U in the decoder's stream), B sequences, N records, S streams, M target positions
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moltron.common import rng
from moltron.config.schema import ObjectiveConfig
from moltron.layers.compiled import compile_by_row
from moltron.layers.losses import IGNORE, cross_entropy_sum
from moltron.models.batch import Output, PackedBatch

QUANTUM = 64  # M is a multiple of it


class Limits(NamedTuple):
    """Tokens of one sequence at most, specials included; decoder: None where there is none."""

    encoder: int
    decoder: int | None = None


class Objective:
    """streams: 1, or 2 with a decoder's. crops: whether a part of a record is as good as the whole. reconstructs:
    whether a decoder writes whole molecules, as the encoder read them.

    encoder_rows, decoder_rows: which of a molecule's SMILES each stream reads: "random", "canonical", "same".
    """

    streams = 1
    crops = True
    reconstructs = False
    encoder_rows, decoder_rows = "random", "same"

    def __init__(self, config: ObjectiveConfig, tokenizer: Any, seed: int):
        problems = self.problems(config, tokenizer)
        if problems:
            raise ValueError("; ".join(problems))
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
        self._cross_entropy: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = cross_entropy_sum

    def compile(self) -> None:
        """torch.compile what `loss` computes: one pass over the logits instead of eight."""
        self._cross_entropy = compile_by_row(cross_entropy_sum, rows=2)

    @staticmethod
    def problems(config: ObjectiveConfig, tokenizer: Any) -> list[str]:
        """What cannot work, as sentences."""
        raise NotImplementedError

    def max_residues(self, limits: Limits) -> int:
        """The most tokens of a record, without specials, whose streams surely fit."""
        raise NotImplementedError

    def lengths(self, lengths_N: np.ndarray, records_N: np.ndarray, epoch: int, limits: Limits) -> np.ndarray:
        """(S, N) int64: what `batch` makes of records of so many tokens."""
        raise NotImplementedError

    def batch(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        records: np.ndarray,
        epoch: int,
        *,
        tokens: tuple[int, ...],
        limits: Limits,
        targets: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> PackedBatch:
        """One pack. ids: (Σ lengths,) without specials, sequence after sequence. tokens: T, or (T, U). targets: ids and
        lengths of what the decoder is to write, where that is not `ids`."""
        raise NotImplementedError

    def loss(self, output: Output, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Cross-entropy in nats, summed in fp32 over the targets, and their number; both 0-dim on the device."""
        assert output.logits is not None and batch.targets is not None, "the batch has no targets"
        return self._cross_entropy(output.logits, batch.targets)


def surround(ids: np.ndarray, lengths: np.ndarray, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> np.ndarray:
    """(Σ lengths,) ids, sequence after sequence → (Σ lengths + B · specials,), each between `prefix` and `suffix`."""
    if not prefix and not suffix:
        return ids
    ends = np.cumsum(lengths)
    places = np.column_stack([ends - lengths] * len(prefix) + [ends] * len(suffix)).ravel()
    return np.insert(ids, places, np.tile([*prefix, *suffix], len(lengths)))


def within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, 2 … within each of the sequences that lie end to end."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def smallest(bits: rng.U64, lengths: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Indices, ascending, of the `count` smallest of each sequence's bits (the upper 24; ties in order of place)."""
    sequence, upper = np.repeat(np.arange(len(lengths), dtype=np.uint64), lengths), bits >> np.uint64(40)
    if max(len(bits), len(lengths)) > 2**20:
        order = np.lexsort((upper, sequence))
    else:  # 20 bits sequence, 24 random, 20 place: one sort of numbers, 10 times as fast
        keys = sequence << np.uint64(44) | upper << np.uint64(20) | np.arange(len(bits), dtype=np.uint64)
        keys.sort()
        order = (keys & np.uint64(2**20 - 1)).astype(np.int64)
    chosen = np.zeros(len(bits), dtype=bool)
    chosen[order[within(lengths) < np.repeat(count, lengths)]] = True
    return np.flatnonzero(chosen)


def two_streams(
    encoder: tuple[np.ndarray, np.ndarray],
    labels: tuple[np.ndarray, np.ndarray],
    records: np.ndarray,
    *,
    tokenizer: Any,
    tokens: tuple[int, ...],
    limits: Limits,
) -> PackedBatch:
    """A pack for an encoder–decoder. labels: (ids, lengths) with their ends; the decoder reads them behind `bos_id`.

    Every token of the decoder is a target, so M is U and no positions are given; filler has the target -100.
    """
    (ids, lengths), (label_ids, label_lengths) = encoder, labels
    assert limits.decoder is not None
    shifted = np.roll(label_ids, 1)
    shifted[np.cumsum(label_lengths) - label_lengths] = tokenizer.bos_id
    batch = PackedBatch.pack(
        ids,
        lengths,
        tokens=tokens[0],
        pad_id=tokenizer.pad_id,
        max_length=max(limits.encoder, limits.decoder),
        records=records,
        decoder=(shifted, label_lengths, tokens[1]),
    )
    targets = np.full(tokens[1], IGNORE, dtype=np.int64)
    targets[: len(label_ids)] = label_ids
    return replace(batch, targets=torch.from_numpy(targets))
