"""Reference encoder–decoders with random weights, written by others, on padded batches with masks.

A reference computes, for a list of sequences and the decoder's list, logits and every hidden state of the encoder;
`save` writes what `load_pretrained` reads; `ours` renames its tensors (weights or gradients) to our names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from references import randomise
from torch import Tensor, nn

from moltron.models.registry import get_spec

TINY = dict(hidden_size=48, num_layers=3, num_decoder_layers=2, num_heads=4, ffn_size=96)
Run = tuple[list[Tensor], list[list[Tensor]]]  # logits (U, V) of each sequence; of each layer, (T, D) of each sequence


@dataclass
class Reference:
    module: nn.Module
    run: Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], Run]
    save: Callable[[Path], Path]
    ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def padded(sequences: Sequence[np.ndarray], value: int = 0) -> tuple[Tensor, Tensor]:
    """(B, L) ids, and where they are real."""
    ids = torch.full((len(sequences), max(map(len, sequences))), value)
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = torch.from_numpy(sequence)
    lengths = torch.tensor([len(s) for s in sequences])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def unpadded(x: Tensor, sequences: Sequence[np.ndarray]) -> list[Tensor]:
    return [row[: len(sequence)] for row, sequence in zip(x, sequences, strict=True)]


def t5_config(**changes: Any) -> Any:
    from transformers import T5Config

    fields = dict(
        vocab_size=128, d_model=48, d_kv=16, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, relative_attention_num_buckets=12, relative_attention_max_distance=50,
    )  # fmt: skip
    return T5Config(**fields | changes)


def t5(encoder_only: bool = False, **changes: Any) -> Reference:
    from transformers import T5EncoderModel, T5ForConditionalGeneration

    config = t5_config(**changes)
    model = randomise((T5EncoderModel if encoder_only else T5ForConditionalGeneration)(config), std=0.1)
    if not config.scale_decoder_outputs:
        model.lm_head.weight = nn.Parameter(torch.randn(128, 48, generator=torch.Generator().manual_seed(5)) * 0.1)

    def run(sequences: Sequence[np.ndarray], decoder: Sequence[np.ndarray]) -> Run:
        ids, mask = padded(sequences)
        options: dict[str, Any] = dict(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        if encoder_only:
            output = model(**options)
            return [], [unpadded(h, sequences) for h in output.hidden_states]
        decoder_ids, decoder_mask = padded(decoder)
        output = model(**options, decoder_input_ids=decoder_ids, decoder_attention_mask=decoder_mask.long())
        hiddens = [unpadded(h, sequences) for h in output.encoder_hidden_states]
        return unpadded(output.logits, decoder), hiddens

    def save(folder: Path) -> Path:
        model.save_pretrained(folder)
        return folder

    def ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(get_spec("prott5").convert.read_hf(config.to_dict(), tensors, "")[1])

    return Reference(model, run, save, ours)


class TorchEncoderDecoder(nn.Module):
    """ProtT5nv (tied head with a bias) and MegaMolBART (a head of its own) of torch's own layers."""

    def __init__(self, vocab: int, tied: bool, max_positions: int = 192):
        super().__init__()
        width, heads, ffn = TINY["hidden_size"], TINY["num_heads"], TINY["ffn_size"]
        activation = partial(nn.functional.gelu, approximate="tanh")  # torch's fast path takes any nn.GELU for erf
        options: Any = dict(activation=activation, dropout=0.0, batch_first=True, norm_first=True)
        self.embed, self.positions = nn.Embedding(vocab, width), nn.Embedding(max_positions, width)
        encoders = range(TINY["num_layers"])
        self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, ffn, **options) for _ in encoders)
        decoders = range(TINY["num_decoder_layers"])
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(width, heads, ffn, **options) for _ in decoders)
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.head = None if tied else nn.Parameter(torch.empty(vocab, width))
        self.bias = nn.Parameter(torch.empty(vocab)) if tied else None

    def run(self, sequences: Sequence[np.ndarray], decoder: Sequence[np.ndarray]) -> Run:
        (ids, real), (decoder_ids, decoder_real) = padded(sequences), padded(decoder)
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        hiddens = [x]
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=~real)
            hiddens.append(x)
        memory = hiddens[-1] = self.encoder_norm(x)
        length = decoder_ids.shape[1]
        y = self.embed(decoder_ids) + self.positions(torch.arange(length))
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        for layer in self.decoder:
            y = layer(y, memory, causal, tgt_key_padding_mask=~decoder_real, memory_key_padding_mask=~real)
        logits = nn.functional.linear(
            self.decoder_norm(y), self.embed.weight if self.head is None else self.head, self.bias
        )
        return unpadded(logits, decoder), [unpadded(h, sequences) for h in hiddens]


def of_torch(family: str, vocab: int, tied: bool) -> Reference:
    model = randomise(TorchEncoderDecoder(vocab, tied), std=0.1)
    rows = -(-vocab // 64) * 64

    def ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def by_head(x: Tensor, parts: int) -> Tensor:  # torch has part × head, ours head × part
            return x.unflatten(0, (parts, TINY["num_heads"], -1)).transpose(0, 1).flatten(0, 2)

        def with_padding(x: Tensor) -> Tensor:
            return torch.cat([x, torch.zeros(rows - vocab, *x.shape[1:])])

        names = {"embed.weight": with_padding(tensors["embed.weight"])}
        names["embed_positions.weight"] = tensors["positions.weight"]
        names["head.bias" if tied else "head.weight"] = with_padding(tensors["bias" if tied else "head"])
        width = TINY["hidden_size"]
        for end in ("weight", "bias"):
            for stack, depth in (("encoder", TINY["num_layers"]), ("decoder", TINY["num_decoder_layers"])):
                names[f"{stack}.norm.{end}"] = tensors[f"{stack}_norm.{end}"]
                pairs = [
                    ("attention_norm", "norm1"), ("attention.out", "self_attn.out_proj"), ("mlp.up", "linear1"),
                    ("mlp.down", "linear2"), ("mlp_norm", "norm2" if stack == "encoder" else "norm3"),
                ]  # fmt: skip
                if stack == "decoder":
                    pairs += [("cross_norm", "norm2"), ("cross_attention.out", "multihead_attn.out_proj")]
                for i in range(depth):
                    a, b = f"{stack}.layers.{i}.", f"{stack}.{i}."
                    names |= {f"{a}{mine}.{end}": tensors[f"{b}{torchs}.{end}"] for mine, torchs in pairs}
                    names[f"{a}attention.qkv.{end}"] = by_head(tensors[f"{b}self_attn.in_proj_{end}"], 3)
                    if stack == "decoder":
                        cross = tensors[f"{b}multihead_attn.in_proj_{end}"]
                        names[f"{a}cross_attention.query.{end}"] = cross[:width]
                        names[f"{a}cross_attention.kv.{end}"] = by_head(cross[width:], 2)
        return names

    def save(folder: Path) -> Path:
        from moltron.checkpoint.weights import save_pretrained

        spec = get_spec(family)
        config = spec.config(**TINY, vocab_size=vocab, max_positions=192)
        own = spec.model(config)
        own.load_state_dict(ours(model.state_dict()))
        return save_pretrained(own, spec, config, folder, "moltron")

    return Reference(model, model.run, save, ours)


REFERENCES: dict[str, Callable[[], Reference]] = {
    "transformers T5": t5,
    "transformers T5, head of its own": lambda: t5(tie_word_embeddings=False),
    "transformers T5, buckets as published, eps": lambda: t5(
        relative_attention_num_buckets=32, relative_attention_max_distance=128, layer_norm_epsilon=1e-3
    ),
    "transformers T5, encoder alone": lambda: t5(encoder_only=True),
    "torch ProtT5nv": lambda: of_torch("prott5", 128, tied=True),
    "torch MegaMolBART": lambda: of_torch("megamolbart", 523, tied=False),
}
