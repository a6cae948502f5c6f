"""The two stacks of an encoder–decoder: packed for training, encoding and scoring, step by step for generation.

    packed    x ── L × (self-attention, in a decoder attention to the memory, feed-forward) ── norm
    a step    one token a sequence; keys and values of the tokens before and of the memory stay in a Cache

Its encoder block is that of the encoder families, too. Knows nothing of vocabularies or families: a `Style` says how
blocks are made.

T tokens (packed), S tokens of the memory, B sequences, D width, N heads, H head width, K keys of one sequence
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moltron.layers.attention import RelativeBias, attend, attend_qkv
from moltron.layers.blocks import FeedForward, SelfAttention, run_blocks
from moltron.layers.layout import Layout
from moltron.layers.positions import Rotary

Pair = tuple[Tensor, Tensor]  # keys and values, (B, N, K, H) each


@dataclass(frozen=True)
class Style:
    """How blocks are made. activation: see FeedForward. scale: of the scores, None is 1 / √head_dim.

    rms_norm: no mean taken off, no bias (T5), instead of LayerNorm. buckets: of T5's relative positions, the first
    half of each direction exact, the others up to `reach` tokens away in logarithmic steps; 0: no relative positions.
    """

    hidden_size: int
    num_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    activation: str = "tanh"
    bias: bool = True
    rms_norm: bool = False
    scale: float | None = None
    buckets: int = 0
    reach: int = 128

    def norm(self) -> nn.Module:
        return (nn.RMSNorm if self.rms_norm else nn.LayerNorm)(self.hidden_size, self.norm_eps)


@dataclass(eq=False)
class Cache:
    """What a decoder keeps between steps, for B sequences.

    own, memory: keys and values of each layer, of the tokens so far (room for `capacity`) and of the encoder's.
    visible: (B, 1, 1, K) bool, which keys of `memory` are the sequence's own. length: tokens so far, of each sequence.
    """

    own: list[Pair]
    memory: list[Pair]
    visible: Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.own[0][0].shape[2]

    def select(self, rows: Tensor) -> Cache:
        """A cache of these sequences, (B',) int64: reordered, repeated, dropped. This one stays as it is."""

        def chosen(pairs: list[Pair]) -> list[Pair]:
            return [(keys.index_select(0, rows), values.index_select(0, rows)) for keys, values in pairs]

        return Cache(chosen(self.own), chosen(self.memory), self.visible.index_select(0, rows), self.length)


class CrossAttention(nn.Module):
    """Queries from the decoder, keys and values from the memory. Rows of `kv` are ordered (head, {k, v}, H)."""

    def __init__(self, style: Style):
        super().__init__()
        self.head_dim = style.head_dim
        width = style.num_heads * style.head_dim
        self.query = nn.Linear(style.hidden_size, width, style.bias)
        self.kv = nn.Linear(style.hidden_size, 2 * width, style.bias)
        self.out = nn.Linear(width, style.hidden_size, style.bias)

    def q_heads(self, x_TD: Tensor) -> Tensor:
        """(T, N, H)"""
        return self.query(x_TD).unflatten(-1, (-1, self.head_dim))

    def kv_heads(self, memory_SD: Tensor) -> Tensor:
        """(S, N, 2, H)"""
        return self.kv(memory_SD).unflatten(-1, (-1, 2, self.head_dim))


class EncoderBlock(nn.Module):
    """x + self-attention(norm(x)), then x + feed-forward(norm(x)). Positions: a bias, or rotary, or in x already."""

    causal = False

    def __init__(self, style: Style):
        super().__init__()
        self.scale = style.scale
        self.attention_norm = style.norm()
        self.attention = SelfAttention(style.hidden_size, style.num_heads, style.head_dim, style.bias)
        self.mlp_norm = style.norm()
        self.mlp = FeedForward(style.hidden_size, style.ffn_size, style.activation, style.bias)

    def forward(self, x_TD: Tensor, layout: Layout, bias: RelativeBias | None, rotary: Rotary = None) -> Tensor:
        x_TD = x_TD + self.attend_own(x_TD, layout, bias, rotary)
        return x_TD + self.mlp(self.mlp_norm(x_TD))

    def attend_own(self, x_TD: Tensor, layout: Layout, bias: RelativeBias | None, rotary: Rotary = None) -> Tensor:
        qkv_TN3H = self.attention.heads(self.attention_norm(x_TD))
        if self.causal or bias is not None or self.scale is not None:
            out_TNH = attend([qkv_TN3H], layout, layout, causal=self.causal, bias=bias, scale=self.scale)
        else:
            out_TNH = attend_qkv(qkv_TN3H, layout, rotary)
        return self.attention.out(out_TNH.flatten(1))


class DecoderBlock(EncoderBlock):
    """Causal, and between the two parts x + attention(norm(x), memory)."""

    causal = True

    def __init__(self, style: Style):
        super().__init__(style)
        self.cross_norm = style.norm()
        self.cross_attention = CrossAttention(style)

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, layout: Layout, bias: RelativeBias | None, memory_SD: Tensor, memory_layout: Layout
    ) -> Tensor:
        x_TD = x_TD + self.attend_own(x_TD, layout, bias)
        q_TN1H = self.cross_attention.q_heads(self.cross_norm(x_TD))[:, :, None]
        kv_SN2H = self.cross_attention.kv_heads(memory_SD)
        out_TNH = attend([q_TN1H, kv_SN2H], layout, memory_layout, scale=self.scale)
        x_TD = x_TD + self.cross_attention.out(out_TNH.flatten(1))
        return x_TD + self.mlp(self.mlp_norm(x_TD))

    def start(self, memory_SD: Tensor, at_BK: Tensor, empty_BK: Tensor) -> Pair:
        """Keys and values of the memory, dense: token `at` of the pack; zeros where `empty`."""
        kv_BKN2H = self.cross_attention.kv_heads(memory_SD)[at_BK].masked_fill(empty_BK[..., None, None, None], 0)
        keys, values = kv_BKN2H.permute(3, 0, 2, 1, 4).contiguous()
        return keys, values

    def step(
        self, x_BD: Tensor, own: Pair, memory: Pair, visible: Tensor, position: int, bias: Tensor | None
    ) -> Tensor:
        """One token a sequence, at `position`; its key and value go into `own`. bias: (1, N, 1, position + 1)."""
        qkv_BN3H = self.attention.heads(self.attention_norm(x_BD))
        for buffer, new_BNH in zip(own, qkv_BN3H.unbind(2)[1:]):
            buffer[:, :, position] = new_BNH
        keys, values = (buffer[:, :, : position + 1] for buffer in own)
        out_BN1H = F.scaled_dot_product_attention(qkv_BN3H[:, :, :1], keys, values, bias, scale=self.scale)
        x_BD = x_BD + self.attention.out(out_BN1H.flatten(1))
        q_BN1H = self.cross_attention.q_heads(self.cross_norm(x_BD))[:, :, None]
        out_BN1H = F.scaled_dot_product_attention(q_BN1H, *memory, visible, scale=self.scale)
        x_BD = x_BD + self.cross_attention.out(out_BN1H.flatten(1))
        return x_BD + self.mlp(self.mlp_norm(x_BD))


class Stack(nn.Module):
    """Blocks by number, the norm after them, and the relative positions they share. block: one of the two above."""

    def __init__(self, block: type[EncoderBlock], num_layers: int, style: Style):
        super().__init__()
        self.layers = nn.ModuleDict({str(i): block(style) for i in range(num_layers)})
        self.norm = style.norm()
        self.relative_bias = nn.Embedding(style.buckets, style.num_heads) if style.buckets else None
        self.columns = bucket_columns(style.buckets, style.reach, block.causal) if style.buckets else []

    def bias(self) -> RelativeBias | None:
        """The table of all distances, of one row of weights a bucket; nothing is read from the device."""
        if self.relative_bias is None:
            return None
        device = self.relative_bias.weight.device
        buckets = torch.cat([torch.full((count,), bucket, device=device) for bucket, count in self.columns])
        rows: Tensor = self.relative_bias(buckets)
        return RelativeBias(rows.to(torch.promote_types(rows.dtype, torch.float32)).t().contiguous())

    def forward(
        self, x_TD: Tensor, layout: Layout, *memory: Tensor | Layout, hidden_layers: Collection[int] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """After the norm, and the layers asked for (see Output). memory: of a decoder, its tokens and their layout."""
        return run_blocks(self.layers, self.norm, x_TD, layout, self.bias(), *memory, hidden_layers=hidden_layers)

    def start(self, memory_SD: Tensor, layout: Layout, capacity: int, num_sequences: int) -> Cache:
        """A decoder's cache before the first token, for the first sequences of `layout`."""
        bounds_B1 = layout.cu_seqlens[: num_sequences + 1, None].long()
        starts, ends = bounds_B1[:-1], bounds_B1[1:]
        at_BK = starts + torch.arange(max(layout.lengths[:num_sequences]), device=memory_SD.device)
        empty_BK = at_BK >= ends
        visible_BK = ~empty_BK
        visible_BK[:, 0] = True  # of an empty sequence one key of zeros: its attention is 0, not 0/0
        at_BK = at_BK.clamp(max=len(memory_SD) - 1)
        blocks = [cast(DecoderBlock, layer) for layer in self.layers.values()]
        memory = [block.start(memory_SD, at_BK, empty_BK) for block in blocks]
        shape = (num_sequences, memory[0][0].shape[1], capacity, memory[0][0].shape[3])
        own = [(memory_SD.new_zeros(shape), memory_SD.new_zeros(shape)) for _ in blocks]
        return Cache(own, memory, visible_BK[:, None, None])

    def step(self, x_BD: Tensor, cache: Cache) -> Tensor:
        """One token a sequence through a decoder, (B, D) after the norm; the cache is one longer."""
        position, bias, bias_1N1K = cache.length, self.bias(), None
        if bias is not None:
            keys_K = torch.arange(position + 1, device=x_BD.device)
            bias_1N1K = bias.between(keys_K[-1:], keys_K).to(x_BD.dtype)[None]
        for layer, own, memory in zip(self.layers.values(), cache.own, cache.memory, strict=True):
            x_BD = cast(DecoderBlock, layer).step(x_BD, own, memory, cache.visible, position, bias_1N1K)
        cache.length += 1
        return self.norm(x_BD)


def bucket_columns(buckets: int, reach: int, causal: bool) -> list[tuple[int, int]]:
    """(bucket, how many distances it has), for k − q from −reach to reach (T5: Raffel et al. 2020, arXiv:1910.10683).

    In fp32 and in this order of operations, as `transformers` counts. Keys ahead have buckets of their own in an
    encoder, and are never seen in a decoder.
    """
    if buckets < 4 or reach <= buckets // 2:
        raise ValueError(f"{buckets} buckets of relative positions up to {reach}: 4 at least, half of them below it")
    side = buckets if causal else buckets // 2
    exact = side // 2

    def bucket(distance: int) -> int:
        away = abs(distance)
        if away >= exact:
            steps = np.log(np.float32(away) / np.float32(exact)) / np.float32(np.log(reach / exact)) * (side - exact)
            away = min(exact + int(steps), side - 1)
        return away if distance <= 0 else 0 if causal else side + away

    return [(b, sum(1 for _ in run)) for b, run in groupby(map(bucket, range(-reach, reach + 1)))]
