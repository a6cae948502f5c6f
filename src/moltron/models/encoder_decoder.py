"""What the encoder–decoder families share: two stacks that read one embedding, a head, decoding with a cache.

    ids ── embed, positions ── encoder ── norm ──> memory
    decoder ids ── embed, positions ── decoder (sequence i looks at sequence i of the memory) ── norm ── head at targets

T tokens of the encoder's stream, U of the decoder's (packed), D width, B sequences, M target positions, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moltron.layers.blocks import init_by_name
from moltron.layers.layout import Layout
from moltron.layers.stacks import Cache, DecoderBlock, EncoderBlock, Stack, Style
from moltron.models.batch import Output, PackedBatch
from moltron.models.encoder import MissingHead, copy_value, pad_to
from moltron.models.spec import ParallelPlan, block_plan

PLAN = ParallelPlan(  # of a family without relative positions
    units=("encoder.layers.*", "decoder.layers.*"),
    compiled=("encoder.norm", "decoder.norm", "head"),
    methods=("encode", "start", "step"),
    tensor={
        "embed": "replicate",
        "embed_positions": "replicate",
        "encoder.layers.0": "scatter tokens",
        "decoder.layers.0": "scatter tokens",
        **block_plan("encoder.layers.*"),
        **block_plan("decoder.layers.*", crosses=True),
        "encoder.norm": "norm, gather tokens",
        "decoder.norm": "norm, gather tokens",
        "head": "replicate",
    },
    context=("encoder.layers.0", "encoder.norm"),
    stages=("embed", "embed_positions", "encoder.layers.*", "encoder.norm", "decoder.layers.*", "decoder.norm", "head"),
)


class Head(nn.Module):
    """Logits: the embedding's own rows, or rows of the head's own, times the scaled hidden state, plus a bias.

    vocab_size: V of the logits; the rows that pad the vocabulary are cut off.
    """

    def __init__(self, hidden_size: int, vocab_size: int, *, tied: bool, bias: bool, scale: float = 1.0):
        super().__init__()
        padded_vocab = pad_to(vocab_size)
        self.vocab_size, self.scale = vocab_size, scale
        self.weight = None if tied else nn.Parameter(torch.empty(padded_vocab, hidden_size))
        self.bias = nn.Parameter(torch.empty(padded_vocab)) if bias else None

    def forward(self, hidden_MD: Tensor, embedding_VD: Tensor | None) -> Tensor:
        hidden_MD = hidden_MD if self.scale == 1.0 else hidden_MD * self.scale
        weight_VD = embedding_VD if self.weight is None else self.weight
        assert weight_VD is not None
        return F.linear(hidden_MD, weight_VD, self.bias)[:, : self.vocab_size]


class EncoderDecoder(nn.Module):
    """Pre-norm stacks that share an embedding. config: a family's dataclass; with `num_decoder_layers=0` there is
    neither decoder nor head: an encoder that embeds.

    positions: whether there are learned ones, one table for both stacks. head: made only where there is a decoder.
    """

    def __init__(self, config: Any, style: Style, *, positions: bool, head: Callable[[], Head]):
        super().__init__()
        self.config, self.style = config, style
        self.embed = nn.Embedding(pad_to(config.vocab_size), config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_positions, config.hidden_size) if positions else None
        self.encoder = Stack(EncoderBlock, config.num_layers, style)
        self.decoder: Stack | None = None
        self.head: nn.Module = MissingHead("This model is an encoder alone (num_decoder_layers=0)")
        if config.num_decoder_layers:
            self.decoder = Stack(DecoderBlock, config.num_decoder_layers, style)
            self.head = head()

    def init_weights(self, seed: int, assign: Callable[[nn.Parameter, Tensor], None] = copy_value) -> None:
        c = self.config
        depths = {"encoder.": c.num_layers, "decoder.": c.num_decoder_layers}
        init_by_name(self, seed=seed, std=c.init_std, depths=depths, vocab_size=c.vocab_size, assign=assign)

    def forward(
        self, batch: PackedBatch, hidden_layers: Collection[int] = (), streams: tuple[Tensor, ...] = ()
    ) -> Output:
        """With a decoder's stream its hidden state (U, D) and logits at the targets, without one the encoder's (T, D).

        Output.hiddens are the encoder's in both cases. streams: of a pipeline stage, what the stage before gave in
        `Output.streams`: the memory so far and the decoder's hidden state, which is its embedding to begin with.
        """
        x_TD, *x_UD = streams or self._embed_streams(batch)
        memory_TD, hiddens = self.encoder(x_TD, batch.layout, hidden_layers=hidden_layers)
        if not x_UD:
            return Output(memory_TD, None, hiddens)
        decoder = self.decoder or self._no_decoder()
        x_UD, _ = decoder(*x_UD, batch.decoder_layout, memory_TD, batch.layout)
        logits = None
        if self.head is not None and batch.targets is not None:
            at = batch.target_positions
            logits = self.logits(x_UD if at is None else x_UD.index_select(0, at))
        return Output(x_UD, logits, hiddens, (memory_TD, x_UD))

    def encode(self, batch: PackedBatch) -> Tensor:
        """(T, D) after the encoder's norm: the memory that `start` takes."""
        return self.encoder(self._embed(batch.ids, batch.layout.positions), batch.layout)[0]

    def _embed_streams(self, batch: PackedBatch) -> tuple[Tensor, ...]:
        x_TD = self._embed(batch.ids, batch.layout.positions)
        if batch.decoder_ids is None or batch.decoder_layout is None:
            return (x_TD,)
        return x_TD, self._embed(batch.decoder_ids, batch.decoder_layout.positions)

    def _embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(ids)
        return x if self.embed_positions is None else x + self.embed_positions(positions)

    def logits(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) after the decoder's norm → (M, V); padding rows of the vocabulary are cut off."""
        embedding_VD = None if self.embed is None else self.embed.weight  # not here where a stage has no need of it
        return self.head(hidden_MD, embedding_VD)

    @torch.no_grad()
    def start(self, memory_TD: Tensor, layout: Layout, capacity: int, num_sequences: int | None = None) -> Cache:
        """A cache for decoding the first `num_sequences` of `layout` (a batch's real ones); None: all, filler too.

        memory_TD: what `encode` gave, or something near it. capacity: the most tokens that will be fed to `step`.
        """
        if self.embed_positions is not None and capacity > self.config.max_positions:
            limit = self.config.max_positions
            raise ValueError(f"{capacity} tokens to decode, but the model has positions for {limit}")
        count = len(layout.lengths) if num_sequences is None else num_sequences
        return (self.decoder or self._no_decoder()).start(memory_TD, layout, capacity, count)

    @torch.no_grad()
    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        """(B, V): logits of the token after `ids_B`, the next one of each sequence; the cache grows by it."""
        if cache.length == cache.capacity:
            raise ValueError(f"the cache has room for {cache.capacity} tokens, and is full: start a larger one")
        positions = torch.full_like(ids_B, cache.length)
        return self.logits((self.decoder or self._no_decoder()).step(self._embed(ids_B, positions), cache))

    def _no_decoder(self) -> NoReturn:
        raise ValueError("This model is an encoder alone (num_decoder_layers=0): it cannot be trained or decode")

    def flops(self, batch: PackedBatch) -> float:
        """Training FLOPs of the real tokens, 3 × those of a forward: 2 a weight and token, and in attention 4 a head
        width and (query, key), of which a causal one sees half. With the head at every token of the decoder.
        """
        c, s = self.config, self.style
        wide = s.num_heads * s.head_dim
        own, mlp, half = 4 * s.hidden_size * wide, 2 * s.hidden_size * s.ffn_size, 2 * s.hidden_size * wide
        lengths = np.array(batch.layout.lengths[: batch.num_sequences], dtype=np.float64)
        forward = c.num_layers * (2 * (own + mlp) * lengths.sum() + 4 * wide * np.square(lengths).sum())
        if batch.decoder_layout is not None:
            seconds = np.array(batch.decoder_layout.lengths[: batch.num_sequences], dtype=np.float64)
            weights = (own + half + mlp) * seconds.sum() + half * lengths.sum()
            pairs = np.square(seconds).sum() / 2 + (seconds * lengths).sum()
            forward += c.num_decoder_layers * (2 * weights + 4 * wide * pairs)
            forward += 2 * s.hidden_size * c.vocab_size * seconds.sum()
        return 3 * float(forward)
