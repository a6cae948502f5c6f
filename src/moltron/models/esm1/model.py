"""ESM-1: ESM-1b (Rives et al. 2021, doi:10.1073/pnas.2016239118) and BioNeMo's ESM-1nv: spec models.md §1, §2.

    ids ── embed + learned positions [token dropout, norm] ── L × (attention, feed-forward) ── norm ── head

T tokens (packed), D width, L layers, M target positions, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from moltron.models.batch import PackedBatch
from moltron.models.encoder import Encoder


@dataclass(frozen=True)
class Esm1Config:
    """The defaults are ESM-1nv's; ESM-1b differs in vocabulary, GELU, token dropout, norm and contact head."""

    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_size: int
    vocab_size: int = 30
    max_positions: int = 512  # learned: there is none beyond
    layer_norm_eps: float = 1e-5
    gelu: str = "tanh"  # "none" is the exact (erf) form
    token_dropout: bool = False
    embed_norm: bool = False  # a LayerNorm before the first block
    contact_head: bool = False
    mask_id: int = 4
    init_std: float = 0.02
    tokenizer: str = "esm1nv"
    positions_end: ClassVar[bool] = True


class Esm1(Encoder):
    def __init__(self, config: Esm1Config):
        super().__init__(config, gelu=config.gelu, contact_head=config.contact_head)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.embed_norm else None

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        x_TD = super().embed_tokens(batch) + self.embed_positions(batch.layout.positions)
        return x_TD if self.embed_norm is None else self.embed_norm(x_TD)
