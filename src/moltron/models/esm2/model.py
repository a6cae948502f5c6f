"""ESM-2 (Lin et al. 2023, doi:10.1126/science.ade2574): spec models.md §1, §2.

    ids ── embed, token dropout ── L × (attention with rotary positions, feed-forward) ── norm ── head at the targets

T tokens (packed), D width, L layers, M target positions, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moltron.layers.positions import Rotary, rotary_table
from moltron.models.batch import PackedBatch
from moltron.models.encoder import Encoder


@dataclass(frozen=True)
class Esm2Config:
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    vocab_size: int = 33
    max_positions: int = 1024  # tokens it was made for; rotary positions go on beyond
    layer_norm_eps: float = 1e-5
    token_dropout: bool = True
    mask_id: int = 32
    rotary_base: float = 10000.0
    rotary_dtype: str = "float32"  # what the frequencies are rounded to; checkpoints trained in fp16 hold them so
    init_std: float = 0.02
    tokenizer: str = "esm2"
    positions_end: ClassVar[bool] = False


class Esm2(Encoder):
    def __init__(self, config: Esm2Config):
        super().__init__(config, gelu="none", contact_head=True)

    def rotary(self, batch: PackedBatch) -> Rotary:
        head_dim = self.config.hidden_size // self.config.num_heads
        rounded_to = getattr(torch, self.config.rotary_dtype)
        return rotary_table(batch.layout.positions, head_dim, self.config.rotary_base, rounded_to)
