"""MegaMolBART (after Chemformer, Irwin et al. 2022, doi:10.1088/2632-2153/ac3ffb): spec models.md §1, §2.

Learned positions, LayerNorm, tanh GELU, biases everywhere but in the head, which has rows of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from moltron.layers.stacks import Style
from moltron.models.encoder_decoder import EncoderDecoder, Head


@dataclass(frozen=True)
class MegaMolBartConfig:
    hidden_size: int
    num_layers: int
    num_decoder_layers: int = field(metadata={"least": 0})  # 0: an encoder that embeds
    num_heads: int
    ffn_size: int
    vocab_size: int = 523
    max_positions: int = 128  # learned, of both stacks: there is none beyond
    layer_norm_eps: float = 1e-5
    init_std: float = 0.02
    tokenizer: str = "megamolbart"
    positions_end: ClassVar[bool] = True


class MegaMolBart(EncoderDecoder):
    def __init__(self, config: MegaMolBartConfig):
        c = config
        style = Style(c.hidden_size, c.num_heads, c.hidden_size // c.num_heads, c.ffn_size, c.layer_norm_eps)
        head = partial(Head, c.hidden_size, c.vocab_size, tied=False, bias=False)
        super().__init__(c, style, positions=True, head=head)
