"""ESM-2's weights and configuration in `transformers` (EsmForMaskedLM, EsmModel) and in fair-esm's .pt files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moltron.layers.positions import rotary_frequencies
from moltron.models.esm2.model import Esm2Config
from moltron.models.esm_layouts import (
    FAIR_ESM,
    HUGGINGFACE,
    PAD_ID,
    fair_names,
    fields_from_hf,
    fields_to_hf,
    layout,
    normal_names,
)
from moltron.models.weightmap import Conversion, Renamed, Weights, read, write

SKIP = ("embed_positions", "embed_norm")  # ESM-1b has them
INV_FREQ = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"  # read by transformers 4 and 5


def is_hf(theirs: Mapping[str, Any]) -> bool:
    return theirs.get("model_type") == "esm" and theirs.get("position_embedding_type") == "rotary"


def read_hf(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Weights:
    handled = ("position_embedding_type", "max_position_embeddings", "emb_layer_norm_before", "rope_theta")
    fields = fields_from_hf(theirs, handled, where)
    if theirs.get("emb_layer_norm_before"):
        raise ValueError(f"{where}/config.json: emb_layer_norm_before with rotary positions is not supported")
    max_positions = theirs.get("max_position_embeddings", 1026) - PAD_ID - 1
    base = theirs.get("rope_theta", 10000.0)
    config = Esm2Config(**fields, max_positions=max_positions, rotary_base=base)
    renamed = Renamed(normal_names(tensors), tensors)
    config = replace(config, rotary_dtype=find_rotary_dtype(config, renamed, where))
    return config, read(layout(config, HUGGINGFACE, SKIP), renamed, where)


def write_hf(config: Esm2Config, tensors: Mapping[str, Tensor]) -> Weights:
    theirs = fields_to_hf(config) | {
        "position_embedding_type": "rotary",
        "rope_theta": config.rotary_base,
        "emb_layer_norm_before": False,
    }
    head_dim, rounded_to = config.hidden_size // config.num_heads, getattr(torch, config.rotary_dtype)

    def written() -> Iterator[tuple[str, Tensor]]:
        yield from write(layout(config, HUGGINGFACE, SKIP), tensors)
        for i in range(config.num_layers):
            yield INV_FREQ.format(i), rotary_frequencies(head_dim, config.rotary_base, rounded_to)

    return theirs, written()


def is_fair(checkpoint: Mapping[str, Any]) -> bool:
    return "cfg" in checkpoint


def read_fair(checkpoint: Mapping[str, Any], where: str) -> Weights:
    args, weights = checkpoint["cfg"]["model"], checkpoint["model"]
    tensors = Renamed(fair_names(weights), weights)
    config = Esm2Config(
        hidden_size=args.encoder_embed_dim,
        num_layers=args.encoder_layers,
        num_heads=args.encoder_attention_heads,
        ffn_size=4 * args.encoder_embed_dim,
        token_dropout=bool(args.token_dropout),
    )
    config = replace(config, rotary_dtype=find_rotary_dtype(config, tensors, where))
    return config, read(layout(config, FAIR_ESM, SKIP), tensors, where)


def find_rotary_dtype(config: Esm2Config, tensors: Mapping[str, Tensor], where: str) -> str:
    """What the stored frequencies were rounded to; float32 where none are stored.

    The keys are dropped, but not what they mean: a model trained in fp16 holds frequencies rounded to it, and fair-esm
    and transformers use those. Exact ones turn position 1000 by 0.16 rad (head width 64; 0.24 at 128).
    """
    stored = next((name for name in tensors if name.endswith("inv_freq")), None)
    if stored is None:
        return "float32"
    found = tensors[stored]
    for dtype in (found.dtype, torch.float32, torch.float16, torch.bfloat16):
        exact = rotary_frequencies(config.hidden_size // config.num_heads, config.rotary_base, dtype)
        rtol = 1e-6 if dtype != torch.bfloat16 else 2**-8  # bf16 of fp16 is one unit off where that rounded to a tie
        if found.shape == exact.shape and torch.allclose(found.float(), exact, rtol=rtol, atol=0):
            return str(dtype).removeprefix("torch.")
    raise ValueError(f"{where}: {stored} holds other rotary frequencies than base {config.rotary_base} gives")


CONVERSION = Conversion(is_hf, read_hf, write_hf, is_fair, read_fair)
