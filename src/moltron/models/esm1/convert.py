"""ESM-1b's weights and configuration in `transformers` (EsmForMaskedLM, EsmModel) and in fair-esm's .pt files.

ESM-1nv has no counterpart there: its vocabulary and its tanh GELU are no `transformers` ESM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moltron.models import esm_layouts as layouts
from moltron.models.esm1.model import Esm1Config
from moltron.models.weightmap import Conversion, Weights, write


def read_hf(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Weights:
    tensors = layouts.normal_names(tensors)
    config = Esm1Config(
        **layouts.fields_from_hf(theirs, where),
        embed_norm=bool(theirs.get("emb_layer_norm_before")),
        contact_head="esm.contact_head.regression.weight" in tensors,
        gelu="none",
    )
    return config, layouts.read_weights(config, layouts.HUGGINGFACE, tensors, where)


def write_hf(config: Esm1Config, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if config.tokenizer != layouts.TOKENIZER or config.gelu != "none":
        raise ValueError(
            f"transformers has no ESM with tokenizer {config.tokenizer!r} and GELU {config.gelu!r} (ESM-1nv): "
            "use format=moltron"
        )
    theirs = {"position_embedding_type": "absolute", "emb_layer_norm_before": config.embed_norm}
    if not config.contact_head:  # transformers' ESM always has one
        zeros = torch.zeros(1, config.num_layers * config.num_heads)
        tensors = {**tensors, "contact_head.weight": zeros, "contact_head.bias": torch.zeros(1)}
    return layouts.fields_to_hf(config) | theirs, write(layouts.rows(config, layouts.HUGGINGFACE), tensors)


def read_fair(checkpoint: Mapping[str, Any], where: str) -> Weights:
    arguments, tensors = checkpoint["args"], layouts.fair_names(checkpoint["model"])
    if arguments.arch != "roberta_large":
        raise ValueError(f"{where}: architecture {arguments.arch!r} is not ESM-1b ('roberta_large') or ESM-2")
    config = Esm1Config(
        **layouts.fields_from_fair(arguments),
        vocab_size=33,
        max_positions=arguments.max_positions,
        gelu="none",
        embed_norm="emb_layer_norm_before.weight" in tensors,
        contact_head="contact_head.regression.weight" in tensors,
        mask_id=32,
        tokenizer=layouts.TOKENIZER,
    )

    def mask_row_zeroed() -> Iterator[tuple[str, Tensor]]:
        """As fair-esm's own loader leaves it, so that the tied decoder has zeros there too."""
        for name, tensor in layouts.read_weights(config, layouts.FAIR_ESM, tensors, where):
            if name == "embed.weight":
                tensor[config.mask_id] = 0  # a fresh tensor: the vocabulary was padded
            yield name, tensor

    return config, mask_row_zeroed()


CONVERSION = Conversion(
    is_hf=lambda theirs: layouts.position_type(theirs) == "absolute",
    is_fair=lambda checkpoint: "args" in checkpoint,
    read_hf=read_hf,
    read_fair=read_fair,
    write_hf=write_hf,
)
