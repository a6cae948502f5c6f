"""What the encoder families share around their blocks: the loop over layers, token dropout, the padded vocabulary."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor, nn

from moltron.layers.positions import Rotary
from moltron.models.batch import Output, PackedBatch

VOCAB_MULTIPLE = 64


def pad_to(vocab_size: int) -> int:
    """The vocabulary is padded once, for speed, never by layout, so a checkpoint has one shape."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def copy_value(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


class Encoder(Protocol):
    """What the families have in common, for `run_encoder` and contacts."""

    layers: nn.ModuleDict
    norm: nn.LayerNorm

    def embed_tokens(self, batch: PackedBatch) -> tuple[Tensor, Rotary]: ...
    def logits(self, hidden_MD: Tensor) -> Tensor: ...


def run_encoder(model: Encoder, batch: PackedBatch, hidden_layers: Collection[int]) -> Output:
    """Embedding → blocks → norm → logits at the batch's targets, keeping the hidden states asked for."""
    x_TD, rotary = model.embed_tokens(batch)
    hiddens = {0: x_TD} if 0 in hidden_layers else {}
    for i, block in enumerate(model.layers.values(), start=1):
        x_TD = block(x_TD, batch.layout, rotary)
        if i in hidden_layers:
            hiddens[i] = x_TD
    x_TD = model.norm(x_TD)
    if len(model.layers) in hidden_layers:
        hiddens[len(model.layers)] = x_TD
    logits = None
    if batch.target_positions is not None:
        logits = model.logits(x_TD.index_select(0, batch.target_positions))
    return Output(x_TD, logits, hiddens)


def token_dropout_scale(batch: PackedBatch, mask_id: int, train_ratio: float = 0.15 * 0.8) -> Tensor:
    """(T, 1) fp32: 0 at `<mask>`, elsewhere (1 − 0.12) / (1 − share of masks in the token's own sequence).

    At inference as well: there the share is 0 and everything is scaled by 0.88 (fair-esm; spec models.md §2).
    """
    is_mask = batch.ids == mask_id
    cu_seqlens = batch.layout.cu_seqlens.long()
    running = torch.nn.functional.pad(is_mask.cumsum(0), (1, 0))
    masks_B = running[cu_seqlens[1:]] - running[cu_seqlens[:-1]]
    scale_B = (1 - train_ratio) / (1 - masks_B / (cu_seqlens[1:] - cu_seqlens[:-1]))
    scale_T = scale_B.index_select(0, batch.layout.sequence_index())
    return scale_T.masked_fill(is_mask, 0.0)[:, None]
