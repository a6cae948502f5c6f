"""ESM-1b's weights and configuration in `transformers` (EsmForMaskedLM, EsmModel) and in fair-esm's .pt files.

ESM-1nv has no counterpart there: its vocabulary and its tanh GELU are no `transformers` ESM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moltron.models.esm1.model import Esm1Config
from moltron.models.esm_layouts import (
    FAIR_ESM,
    HUGGINGFACE,
    PAD_ID,
    TOKENIZER,
    fair_names,
    fields_from_hf,
    fields_to_hf,
    layout,
    normal_names,
)
from moltron.models.weightmap import Conversion, Renamed, Weights, read, write


def skip(config: Esm1Config) -> tuple[str, ...]:
    return (() if config.embed_norm else ("embed_norm",)) + (() if config.contact_head else ("contact_head",))


def is_hf(theirs: Mapping[str, Any]) -> bool:
    return theirs.get("model_type") == "esm" and theirs.get("position_embedding_type", "absolute") == "absolute"


def read_hf(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Weights:
    handled = ("position_embedding_type", "max_position_embeddings", "emb_layer_norm_before", "rope_theta")
    renamed = Renamed(normal_names(tensors), tensors)
    config = Esm1Config(
        **fields_from_hf(theirs, handled, where),
        max_positions=theirs.get("max_position_embeddings", 1026) - PAD_ID - 1,
        embed_norm=bool(theirs.get("emb_layer_norm_before")),
        contact_head="esm.contact_head.regression.weight" in renamed,
        gelu="none",
    )
    return config, read(layout(config, HUGGINGFACE, skip(config)), renamed, where)


def write_hf(config: Esm1Config, tensors: Mapping[str, Tensor]) -> Weights:
    if config.tokenizer != TOKENIZER or config.gelu != "none":
        raise ValueError(
            f"transformers has no ESM with tokenizer {config.tokenizer!r} and GELU {config.gelu!r} (ESM-1nv): "
            "use format=moltron"
        )
    theirs = fields_to_hf(config) | {
        "position_embedding_type": "absolute",
        "emb_layer_norm_before": config.embed_norm,
    }
    if not config.contact_head:  # transformers' ESM always has one
        zeros = torch.zeros(1, config.num_layers * config.num_heads)
        tensors = {**tensors, "contact_head.weight": zeros, "contact_head.bias": torch.zeros(1)}
    return theirs, write(layout(config, HUGGINGFACE, () if config.embed_norm else ("embed_norm",)), tensors)


def is_fair(checkpoint: Mapping[str, Any]) -> bool:
    return "args" in checkpoint


def read_fair(checkpoint: Mapping[str, Any], where: str) -> Weights:
    arguments, weights = vars(checkpoint["args"]), checkpoint["model"]
    if arguments["arch"] != "roberta_large":
        raise ValueError(f"{where}: architecture {arguments['arch']!r} is not ESM-1b ('roberta_large') or ESM-2")
    arguments = {name.removeprefix("encoder_"): value for name, value in arguments.items()}
    tensors = Renamed(fair_names(weights), weights)
    config = Esm1Config(
        hidden_size=arguments["embed_dim"],
        num_layers=arguments["layers"],
        num_heads=arguments["attention_heads"],
        ffn_size=arguments["ffn_embed_dim"],
        vocab_size=33,
        max_positions=arguments["max_positions"],
        gelu="none",
        token_dropout=bool(arguments.get("token_dropout", False)),
        embed_norm="emb_layer_norm_before.weight" in tensors,
        contact_head="contact_head.regression.weight" in tensors,
        mask_id=32,
        tokenizer=TOKENIZER,
    )

    def mask_row_zeroed() -> Iterator[tuple[str, Tensor]]:
        """As fair-esm's own loader leaves it, so that the tied decoder has zeros there too."""
        for name, tensor in read(layout(config, FAIR_ESM, skip(config)), tensors, where):
            if name == "embed.weight":
                tensor[config.mask_id] = 0  # a fresh tensor: the vocabulary was padded
            yield name, tensor

    return config, mask_row_zeroed()


CONVERSION = Conversion(is_hf, read_hf, write_hf, is_fair, read_fair)
