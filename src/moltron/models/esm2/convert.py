"""ESM-2's weights and configuration in `transformers` (EsmForMaskedLM, EsmModel) and in fair-esm's .pt files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moltron.layers.positions import rotary_frequencies
from moltron.models import esm_layouts as layouts
from moltron.models.esm2.model import Esm2Config
from moltron.models.weightmap import Conversion, Weights, write

INV_FREQ = "esm.encoder.layer.{}.attention.self.rotary_embeddings.inv_freq"  # read by transformers 4 and 5


def read_hf(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Weights:
    config = Esm2Config(**layouts.fields_from_hf(theirs, where), rotary_base=theirs.get("rope_theta", 10000.0))
    if theirs.get("emb_layer_norm_before"):
        raise ValueError(f"{where}/config.json: emb_layer_norm_before with rotary positions is not supported")
    config = with_rotary_dtype(config, tensors, where)
    return config, layouts.read_weights(config, layouts.HUGGINGFACE, layouts.normal_names(tensors), where)


def write_hf(config: Esm2Config, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    theirs = {"position_embedding_type": "rotary", "rope_theta": config.rotary_base, "emb_layer_norm_before": False}
    written = write(layouts.rows(config, layouts.HUGGINGFACE), tensors)
    for i in range(config.num_layers):
        written[INV_FREQ.format(i)] = frequencies(config, config.rotary_dtype)
    return layouts.fields_to_hf(config) | theirs, written


def read_fair(checkpoint: Mapping[str, Any], where: str) -> Weights:
    fields, tensors = layouts.fields_from_fair(checkpoint["cfg"]["model"]), layouts.fair_names(checkpoint["model"])
    fields["ffn_size"] = 4 * fields["hidden_size"]  # as fair-esm has it, whatever the file says
    config = with_rotary_dtype(Esm2Config(**fields), tensors, where)
    return config, layouts.read_weights(config, layouts.FAIR_ESM, tensors, where)


def frequencies(config: Esm2Config, dtype: str) -> Tensor:
    return rotary_frequencies(config.hidden_size // config.num_heads, config.rotary_base, getattr(torch, dtype))


def with_rotary_dtype(config: Esm2Config, tensors: Mapping[str, Tensor], where: str) -> Esm2Config:
    """Says what the stored frequencies were rounded to; float32 where none are stored.

    The keys are dropped, but not what they mean: a model trained in fp16 holds frequencies rounded to it, and fair-esm
    and transformers use those. Exact ones turn position 1000 by 0.16 rad (head width 64; 0.24 at 128).
    """
    found = next((tensor.float() for name, tensor in tensors.items() if name.endswith("inv_freq")), None)
    if found is None:
        return config
    # bf16 of fp16 is one unit off where that rounded to a tie
    for dtype, rtol in (("float32", 1e-6), ("float16", 1e-6), ("bfloat16", 2**-7)):
        rounded = frequencies(config, dtype)
        if found.shape == rounded.shape and torch.allclose(found, rounded, rtol=rtol, atol=0):
            return replace(config, rotary_dtype=dtype)
    raise ValueError(f"{where}: inv_freq holds other rotary frequencies than base {config.rotary_base} gives")


CONVERSION = Conversion(
    is_hf=lambda theirs: layouts.position_type(theirs) == "rotary",
    is_fair=lambda checkpoint: "cfg" in checkpoint,
    read_hf=read_hf,
    read_fair=read_fair,
    write_hf=write_hf,
)
