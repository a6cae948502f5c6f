"""The packed batch: what every model reads, in training, evaluation, bulk embedding and the server alike.

    records (ids without padding) ──PackedBatch.pack──> ids (T,), layout ──model──> hidden (T, D)

The T tokens of a batch are real sequences, then filler: pad tokens in sequences of their own, which no real token can
see and nothing counts. Knows nothing of tokenizers, data sets or objectives.

T tokens in a batch, B sequences, M target positions
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moltron.layers.layout import Layout


@dataclass(eq=False)
class PackedBatch:
    """One pack of T tokens.

    ids: (T,) int64 token ids, corrupted by the objective in training.
    layout: where each sequence begins; the sequences from `num_sequences` on are filler.
    num_sequences, num_tokens: the real ones, without filler.
    records: (num_sequences,) int64, index of each sequence's record in its data set; for reports.
    target_positions, targets: (M,) int64, where the loss is taken and the true ids; -100 in `targets` fills up to M.
    """

    ids: Tensor
    layout: Layout
    num_sequences: int
    num_tokens: int
    records: np.ndarray
    target_positions: Tensor | None = None
    targets: Tensor | None = None

    @staticmethod
    def pack(
        ids: np.ndarray,
        lengths: np.ndarray,
        *,
        tokens: int,
        pad_id: int,
        max_length: int,
        records: np.ndarray | None = None,
    ) -> PackedBatch:
        """Lay sequences end to end and fill up to `tokens`.

        ids: (Σ lengths,) token ids, specials included; lengths: (B,) each ≤ max_length; Σ lengths ≤ tokens.
        """
        num_tokens, num_sequences = int(lengths.sum()), len(lengths)
        if num_tokens > tokens:
            raise ValueError(f"{num_tokens} tokens do not fit into a pack of {tokens}")
        filler = tokens - num_tokens
        filler_lengths = [max_length] * (filler // max_length) + ([filler % max_length] if filler % max_length else [])
        all_lengths = np.concatenate([lengths, filler_lengths]).astype(np.int64)
        packed = np.full(tokens, pad_id, dtype=np.int64)
        packed[:num_tokens] = ids
        if records is None:
            records = np.arange(num_sequences, dtype=np.int64)
        layout = Layout.of(all_lengths)
        return PackedBatch(torch.from_numpy(packed), layout, num_sequences, num_tokens, records)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device, non_blocking=non_blocking)

        return replace(
            self,
            ids=move(self.ids),
            layout=self.layout.to(device, non_blocking),
            target_positions=move(self.target_positions),
            targets=move(self.targets),
        )

    def pin_memory(self) -> PackedBatch:
        """Page-locked copies of all tensors, so that `.to(device, non_blocking=True)` overlaps with compute."""
        pin = lambda x: None if x is None else x.pin_memory()  # noqa: E731
        return replace(
            self,
            ids=self.ids.pin_memory(),
            layout=self.layout.pin_memory(),
            target_positions=pin(self.target_positions),
            targets=pin(self.targets),
        )


@dataclass(eq=False)
class Output:
    """What a model returns for a batch.

    hidden: (T, D) after the final norm. logits: (M, V) at `batch.target_positions`, None without them; V is the true
    vocabulary, padding rows are cut off. hiddens: the layers asked for, each (T, D): 0 is the embedding output,
    i the output of block i, the last one after the final norm (as in `transformers`' and fair-esm's lists).
    """

    hidden: Tensor
    logits: Tensor | None
    hiddens: dict[int, Tensor]
