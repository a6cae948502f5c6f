"""ESM-1: ESM-1b (Rives et al. 2021, doi:10.1073/pnas.2016239118) and BioNeMo's ESM-1nv: spec models.md §1, §2.

    ids ── embed + learned positions [token dropout, norm] ── L × (attention, feed-forward) ── norm ── head

T tokens (packed), D width, L layers, M target positions, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from moltron.layers.blocks import Block, MaskedLMHead, init_encoder_weights
from moltron.layers.positions import Rotary
from moltron.models.batch import Output, PackedBatch
from moltron.models.encoder import copy_value, pad_to, run_encoder, token_dropout_scale


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


class Esm1(nn.Module):
    def __init__(self, config: Esm1Config):
        super().__init__()
        self.config = config
        padded_vocab = pad_to(config.vocab_size)
        sizes = (config.hidden_size, config.num_heads, config.ffn_size, config.layer_norm_eps, config.gelu)
        self.embed = nn.Embedding(padded_vocab, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps) if config.embed_norm else None
        self.layers = nn.ModuleDict({str(i): Block(*sizes) for i in range(config.num_layers)})
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = MaskedLMHead(config.hidden_size, padded_vocab, config.layer_norm_eps, config.gelu)
        self.contact_head = None
        if config.contact_head:
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
        x_TD = x_TD + self.embed_positions(batch.layout.positions)
        return (x_TD if self.embed_norm is None else self.embed_norm(x_TD)), None

    def forward(self, batch: PackedBatch, hidden_layers: Collection[int] = ()) -> Output:
        return run_encoder(self, batch, hidden_layers)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) after the final norm → (M, V); padding rows of the vocabulary are cut off."""
        return self.head(hidden_MD, self.embed.weight)[:, : self.config.vocab_size]

    def flops_per_token(self, effective_length: float) -> float:
        """Training FLOPs a token: 3·(24·L·h² + 4·L·h·s), s = Σ len² / Σ len (design/performance.md)."""
        c = self.config
        return 3 * (24 * c.num_layers * c.hidden_size**2 + 4 * c.num_layers * c.hidden_size * effective_length)
