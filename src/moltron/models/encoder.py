"""What the encoder families share: everything but how positions come in, and the padded vocabulary.

    embed_tokens (a family may add to it) ── L blocks ── norm ── head at the batch's targets

T tokens (packed), D width, L layers, M target positions, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moltron.layers.blocks import MaskedLMHead, init_by_name, run_blocks
from moltron.layers.positions import Rotary
from moltron.layers.stacks import EncoderBlock, Style
from moltron.models.batch import Output, PackedBatch
from moltron.models.spec import ParallelPlan, block_plan


def pad_to(vocab_size: int, multiple: int = 64) -> int:
    """The vocabulary is padded once, for speed, never by layout, so a checkpoint has one shape."""
    return -(-vocab_size // multiple) * multiple


def encoder_plan(*embedding: str) -> ParallelPlan:
    """How an `Encoder` is cut. embedding: modules of the family's own between `embed` and the first block."""
    tensor = {
        **dict.fromkeys(("embed", *embedding), "replicate"),
        "layers.0": "scatter tokens",
        **block_plan("layers.*"),
        "norm": "norm, gather tokens",
        "head": "replicate",
    }
    stages = ("embed", *embedding, "layers.*", "norm", "head", "contact_head")
    return ParallelPlan(units=("layers.*",), tensor=tensor, stages=stages, copied={"embed": "head"})


def copy_value(parameter: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(value)


class MissingHead(nn.Module):
    """Stands where there is no language-model head. why: the beginning of the sentence that a user reads."""

    def __init__(self, why: str):
        super().__init__()
        self.why = why

    def forward(self, *_: Any) -> Tensor:
        raise ValueError(f"{self.why}: it gives embeddings, but no logits or losses")


class Encoder(nn.Module):
    """A pre-norm encoder with a masked-LM head. config: a family's dataclass; gelu: "none" (exact, erf) or "tanh"."""

    def __init__(self, config: Any, *, gelu: str, contact_head: bool):
        super().__init__()
        self.config = config
        padded_vocab = pad_to(config.vocab_size)
        head_dim = config.hidden_size // config.num_heads
        style = Style(config.hidden_size, config.num_heads, head_dim, config.ffn_size, config.layer_norm_eps, gelu)
        self.embed = nn.Embedding(padded_vocab, config.hidden_size)
        self.layers = nn.ModuleDict({str(i): EncoderBlock(style) for i in range(config.num_layers)})
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = MaskedLMHead(config.hidden_size, config.vocab_size, padded_vocab, config.layer_norm_eps, gelu)
        self.contact_head: nn.Linear | None = None  # not trained, so it takes no gradient
        if contact_head:
            self.contact_head = nn.Linear(config.num_layers * config.num_heads, 1).requires_grad_(False)

    def init_weights(self, seed: int, assign: Callable[[nn.Parameter, Tensor], None] = copy_value) -> None:
        c, depths = self.config, {"layers.": self.config.num_layers}
        init_by_name(self, seed=seed, std=c.init_std, depths=depths, vocab_size=c.vocab_size, assign=assign)

    def embed_tokens(self, batch: PackedBatch) -> Tensor:
        """(T, D) that enters the first block; a family with more in its embedding adds it."""
        x_TD = self.embed(batch.ids)
        if self.config.token_dropout:
            x_TD = x_TD * token_dropout_scale(batch, self.config.mask_id).to(x_TD.dtype)
        return x_TD

    def rotary(self, batch: PackedBatch) -> Rotary:
        """The table that all blocks share; None: positions are in the embedding."""
        return None

    def forward(
        self, batch: PackedBatch, hidden_layers: Collection[int] = (), streams: tuple[Tensor, ...] = ()
    ) -> Output:
        """streams: of a pipeline stage, what the stage before gave in `Output.streams`."""
        x_TD = streams[0] if streams else self.embed_tokens(batch)
        rotary = self.rotary(batch)
        inputs = batch.layout, None, rotary
        x_TD, hiddens = run_blocks(self.layers, self.norm, x_TD, *inputs, hidden_layers=hidden_layers)
        logits = None
        if self.head is not None and batch.target_positions is not None:
            logits = self.logits(x_TD.index_select(0, batch.target_positions))
        return Output(x_TD, logits, hiddens, (x_TD,))

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) after the final norm → (M, V); padding rows of the vocabulary are cut off."""
        return self.head(hidden_MD, self.embed.weight)

    def flops(self, batch: PackedBatch) -> float:
        """Training FLOPs of the real tokens: 3·L·((8·h² + 4·h·f)·Σ len + 4·h·Σ len²), with f = 4·h as a rule
        (design/performance.md)."""
        c = self.config
        lengths = np.array(batch.layout.lengths[: batch.num_sequences], dtype=np.float64)
        a_layer = c.hidden_size * ((8 * c.hidden_size + 4 * c.ffn_size) * lengths.sum() + 4 * np.square(lengths).sum())
        return 3 * c.num_layers * float(a_layer)


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
