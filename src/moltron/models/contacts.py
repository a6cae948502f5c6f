"""Residue contacts from attention maps (Rao et al. 2021, doi:10.1101/2020.12.15.422761), for ESM-1b and ESM-2.

Each map loses the rows and columns of `<cls>` and `<eos>`, is symmetrised, corrected for its average product (APC),
and enters one logistic regression over all layers and heads. Layers are folded in one by one.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from moltron.layers.stacks import EncoderBlock
from moltron.models.batch import PackedBatch
from moltron.models.encoder import Encoder


def average_product_correction(maps_NLL: Tensor) -> Tensor:
    rows, columns = maps_NLL.sum(-1, keepdim=True), maps_NLL.sum(-2, keepdim=True)
    return maps_NLL - rows * columns / maps_NLL.sum((-1, -2), keepdim=True)


def predict_contacts(model: Encoder, batch: PackedBatch) -> Tensor:
    """Probability of contact of every pair of residues, (L, L) fp32, for the first sequence of the batch.

    Raises ValueError where there is no regression, or one that was not fitted: its weights are 0.
    """
    head = getattr(model, "contact_head", None)
    if head is None:
        raise ValueError("this model has no contact head; ESM-1b and ESM-2 have one")
    if not head.weight.any():
        raise ValueError("the contact head was not fitted; published ESM-1b and ESM-2 weights bring one that was")
    length = batch.layout.lengths[0]
    x_TD, rotary = model.embed_tokens(batch), model.rotary(batch)
    weight_LN = head.weight.float().view(len(model.layers), -1)
    rotary_one = None if rotary is None else (rotary[0][:length], rotary[1][:length])
    logits = head.bias.float()
    for weight_N, layer in zip(weight_LN, model.layers.values(), strict=True):
        block = cast(EncoderBlock, layer)
        maps = block.attention.probabilities(block.attention_norm(x_TD[:length]), rotary_one)[:, 1:-1, 1:-1]
        maps = average_product_correction(maps + maps.transpose(-1, -2))
        logits = logits + torch.einsum("n,nqk->qk", weight_N, maps)
        x_TD = block(x_TD, batch.layout, None, rotary)
    return logits.sigmoid()
