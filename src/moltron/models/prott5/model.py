"""ProtT5, one family with two architectures: spec models.md §1, §2.

nv   BioNeMo's ProtT5nv: learned positions, LayerNorm, biases, tanh GELU; the head is the embedding plus a bias
t5   Rostlab's ProtT5-XL (Elnaggar et al. 2021, doi:10.1109/TPAMI.2021.3095381), a T5: relative positions, RMSNorm,
     no biases, ReLU, head width of its own, scores not scaled
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

from moltron.layers.stacks import Style
from moltron.models.encoder_decoder import EncoderDecoder, Head


@dataclass(frozen=True)
class ProtT5Config:
    """The defaults are ProtT5nv's. Fields after `architecture` are read by t5 alone."""

    hidden_size: int
    num_layers: int
    num_decoder_layers: int = field(metadata={"least": 0})  # 0: an encoder that embeds
    num_heads: int
    ffn_size: int
    vocab_size: int = 128
    max_positions: int = 512  # nv: of both stacks, there is none beyond; t5: tokens it was made for
    norm_eps: float = 1e-5
    init_std: float = 0.015
    tokenizer: str = "prott5nv"
    architecture: str = field(default="nv", metadata={"choices": ("nv", "t5")})
    head_dim: int = field(default=0, metadata={"least": 0})  # 0: hidden_size / num_heads
    relative_buckets: int = 32
    relative_reach: int = 128  # beyond it all keys are equally far
    tied_head: bool = True  # the head is the embedding, and hidden states are multiplied with hidden_size^-0.5

    @property
    def positions_end(self) -> bool:
        return self.architecture == "nv"

    @property
    def blocks_share_weights(self) -> bool:
        """The table of relative positions."""
        return self.architecture == "t5"

    @property
    def trains_compiled(self) -> bool:
        """Not with a bias by distance: where it takes a gradient, attention goes by lengths, new in each pack."""
        return self.architecture == "nv"


class ProtT5(EncoderDecoder):
    def __init__(self, config: ProtT5Config):
        c = config
        style = Style(c.hidden_size, c.num_heads, c.hidden_size // c.num_heads, c.ffn_size, c.norm_eps)
        head = partial(Head, c.hidden_size, c.vocab_size)
        if c.architecture == "nv":
            super().__init__(c, style, positions=True, head=partial(head, tied=True, bias=True))
            return
        style = replace(style, activation="relu", bias=False, rms_norm=True, scale=1.0)
        style = replace(
            style, head_dim=c.head_dim or style.head_dim, buckets=c.relative_buckets, reach=c.relative_reach
        )
        scale = c.hidden_size**-0.5 if c.tied_head else 1.0
        super().__init__(c, style, positions=False, head=partial(head, tied=c.tied_head, bias=False, scale=scale))
