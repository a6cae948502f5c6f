"""ESM-2 (Lin et al. 2023, doi:10.1126/science.ade2574): spec models.md §1, §2.

    ids ── embed, token dropout ── L × (attention with rotary positions, feed-forward) ── norm ── head at the targets

T tokens (packed), D width, L layers, M target positions, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moltron.layers.blocks import Block, MaskedLMHead, init_encoder_weights
from moltron.layers.positions import Rotary, rotary_table
from moltron.models.batch import Output, PackedBatch
from moltron.models.encoder import copy_value, pad_to, run_encoder, token_dropout_scale


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


class Esm2(nn.Module):
    def __init__(self, config: Esm2Config):
        super().__init__()
        self.config = config
        padded_vocab = pad_to(config.vocab_size)
        sizes = (config.hidden_size, config.num_heads, config.ffn_size, config.layer_norm_eps, "none")
        self.embed = nn.Embedding(padded_vocab, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): Block(*sizes) for i in range(config.num_layers)})
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = MaskedLMHead(config.hidden_size, padded_vocab, config.layer_norm_eps, "none")
        self.contact_head = nn.Linear(config.num_layers * config.num_heads, 1).requires_grad_(False)

    def init_weights(self, seed: int, assign: Callable[[nn.Parameter, Tensor], None] = copy_value) -> None:
        c = self.config
        init_encoder_weights(
            self, seed=seed, std=c.init_std, num_layers=c.num_layers, vocab_size=c.vocab_size, assign=assign
        )

    def embed_tokens(self, batch: PackedBatch) -> tuple[Tensor, Rotary]:
        x_TD = self.embed(batch.ids)
        if self.config.token_dropout:
            x_TD = x_TD * token_dropout_scale(batch, self.config.mask_id).to(x_TD.dtype)
        head_dim = self.config.hidden_size // self.config.num_heads
        rounded_to = getattr(torch, self.config.rotary_dtype)
        return x_TD, rotary_table(batch.layout.positions, head_dim, self.config.rotary_base, rounded_to)

    def forward(self, batch: PackedBatch, hidden_layers: Collection[int] = ()) -> Output:
        return run_encoder(self, batch, hidden_layers)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) after the final norm → (M, V); padding rows of the vocabulary are cut off."""
        return self.head(hidden_MD, self.embed.weight)[:, : self.config.vocab_size]

    def flops_per_token(self, effective_length: float) -> float:
        """Training FLOPs a token: 3·(24·L·h² + 4·L·h·s), s = Σ len² / Σ len (design/performance.md)."""
        c = self.config
        return 3 * (24 * c.num_layers * c.hidden_size**2 + 4 * c.num_layers * c.hidden_size * effective_length)
