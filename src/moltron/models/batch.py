"""The packed batch: what every model reads, in training, evaluation, bulk embedding and the server alike.

    records (ids without padding) ──PackedBatch.pack──> ids (T,), layout ──model──> hidden (T, D)

The T tokens of a batch are real sequences, then filler: pad tokens in sequences of their own, which no real token can
see and nothing counts; then empty sequences, so that packs of one T have one or two shapes. Encoder–decoder models read
two such streams, with as many sequences each: sequence i of the decoder's belongs to sequence i of the encoder's.
Knows nothing of tokenizers, data sets or objectives.

T tokens in a batch (U in the decoder's stream), B sequences, M target positions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moltron.layers.layout import Layout


@dataclass(eq=False)
class PackedBatch:
    """One pack of T tokens.

    ids: (T,) int64 token ids, corrupted by the objective in training.
    layout: where each sequence begins; the sequences from `num_sequences` on are filler, the last ones empty.
    num_sequences, num_tokens: the real ones, without filler.
    records: (num_sequences,) int64, index of each sequence's record in its data set; for reports.
    target_positions, targets: (M,) int64, where the loss is taken and the true ids; -100 in `targets` fills up to M.
        Positions count in the stream whose logits the model gives: the decoder's where there is one, and there None
        means that every token is a target.
    decoder_ids: (U,) int64, what the decoder reads (labels shifted right); decoder_layout: of the same number of
        sequences as `layout` (of filler, those left over are empty); num_decoder_tokens: the real ones.
    """

    ids: Tensor
    layout: Layout
    num_sequences: int
    num_tokens: int
    records: np.ndarray
    target_positions: Tensor | None = None
    targets: Tensor | None = None
    decoder_ids: Tensor | None = None
    decoder_layout: Layout | None = None
    num_decoder_tokens: int = 0

    @staticmethod
    def pack(
        ids: np.ndarray | Sequence[np.ndarray],
        lengths: np.ndarray,
        *,
        tokens: int,
        pad_id: int,
        max_length: int,
        records: np.ndarray | None = None,
        decoder: tuple[np.ndarray, np.ndarray, int] | None = None,
        pin: bool = False,
    ) -> PackedBatch:
        """Lay sequences end to end and fill up to `tokens`; last come empty sequences, so that few shapes occur.

        ids: (Σ lengths,) token ids, specials included, or B arrays of them; lengths: (B,) each ≤ max_length;
        Σ lengths ≤ tokens. decoder: (ids, lengths, tokens) of the second stream. pin: in page-locked memory, as
        `pin_memory` does, without a copy.
        """
        streams: list[Any] = [(ids, lengths, tokens)] + ([] if decoder is None else [decoder])
        fillers = [_filler(int(lengths.sum()), tokens, max_length) for _, lengths, tokens in streams]
        count = len(lengths)
        most = -(-(count + max(map(len, fillers))) // _quantum(tokens)) * _quantum(tokens) - count
        packed, layouts = [], []
        for (ids, lengths, tokens), filler in zip(streams, fillers):
            packed.append(torch.empty(tokens, dtype=torch.int64, pin_memory=pin))
            whole, used = packed[-1].numpy(), tokens - sum(filler)
            if isinstance(ids, np.ndarray):
                whole[:used] = ids
            else:
                np.concatenate(ids, out=whole[:used])
            whole[used:] = pad_id
            filler = filler + [0] * (most - len(filler))
            layouts.append(Layout.of(np.concatenate([lengths, filler]).astype(np.int64), pin))
        if records is None:
            records = np.arange(len(lengths), dtype=np.int64)
        batch = PackedBatch(packed[0], layouts[0], count, int(streams[0][1].sum()), records)
        if decoder is None:
            return batch
        second = dict(decoder_ids=packed[1], decoder_layout=layouts[1], num_decoder_tokens=len(decoder[0]))
        return replace(batch, **second)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        return self._each(lambda x: x.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """Page-locked copies of all tensors, so that `.to(device, non_blocking=True)` overlaps with compute."""
        return self._each(lambda x: x.pin_memory())

    def tensors(self) -> list[Tensor]:
        """All of them, the layouts' too, in a fixed order; what else there is stays on the host."""
        found: list[Tensor] = []
        self._each(lambda x: found.append(x) or x)  # type: ignore[func-returns-value]
        return found

    def _each(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        """All tensors changed alike, those of the layouts too."""

        def changed(x: Any) -> Any:
            return change(x) if isinstance(x, Tensor) else x.each(change) if isinstance(x, Layout) else x

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})


def _quantum(tokens: int) -> int:
    """The number of sequences in a pack, filler and empty ones too, is a multiple of it."""
    return max(1, tokens // 256)


def _filler(used: int, tokens: int, max_length: int) -> list[int]:
    """Lengths of the pad sequences that fill up `tokens`."""
    room = tokens - used
    if room < 0:
        raise ValueError(f"{used} tokens do not fit into a pack of {tokens}")
    return [max_length] * (room // max_length) + ([room % max_length] if room % max_length else [])


@dataclass(eq=False)
class Output:
    """What a model returns for a batch.

    hidden: (T, D) after the final norm. logits: (M, V) where the batch has targets, None without; V is the true
    vocabulary, padding rows are cut off. hiddens: the layers asked for, each (T, D): 0 is the embedding output,
    i the output of block i, the last one after the final norm (as in `transformers`' and fair-esm's lists).
    streams: of a pipeline stage that is not the last, the hidden states that the next one takes.
    """

    hidden: Tensor
    logits: Tensor | None
    hiddens: dict[int, Tensor]
    streams: tuple[Tensor, ...] = ()
