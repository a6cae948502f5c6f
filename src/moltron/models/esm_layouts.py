"""ESM-1b and ESM-2 elsewhere: the parameter names of `transformers` and fair-esm, and what their configurations mean.

One table serves both families; their convert.py add what differs. Sources: transformers' EsmForMaskedLM (4.25 to 5.x),
fair-esm's ESM2 and ProteinBertModel and the checkpoints published with it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from moltron.models.encoder import pad_to
from moltron.models.weightmap import SAME, Row, heads, pad_rows, read, read_config
from moltron.tokenizers import get_tokenizer

TOKENIZER = "esm2"  # ESM-1b and ESM-2 share one vocabulary
PAD_ID = 1
UNUSED_POSITIONS = PAD_ID + 1  # both other layouts count positions from here: two rows of the table are never used

# Ours, transformers', fair-esm's. #: a layer's number; *: weight and bias.
HUGGINGFACE, FAIR_ESM = 1, 2
TABLE = (
    ("embed.weight", "esm.embeddings.word_embeddings.weight", "embed_tokens.weight"),
    ("embed_positions.weight", "esm.embeddings.position_embeddings.weight", "embed_positions.weight"),
    ("embed_norm.*", "esm.embeddings.layer_norm.*", "emb_layer_norm_before.*"),
    ("layers.#.attention_norm.*", "esm.encoder.layer.#.attention.LayerNorm.*", "layers.#.self_attn_layer_norm.*"),
    (
        "layers.#.attention.qkv.*",
        " ".join(f"esm.encoder.layer.#.attention.self.{part}.*" for part in ("query", "key", "value")),
        " ".join(f"layers.#.self_attn.{part}_proj.*" for part in "qkv"),
    ),
    ("layers.#.attention.out.*", "esm.encoder.layer.#.attention.output.dense.*", "layers.#.self_attn.out_proj.*"),
    ("layers.#.mlp_norm.*", "esm.encoder.layer.#.LayerNorm.*", "layers.#.final_layer_norm.*"),
    ("layers.#.mlp.up.*", "esm.encoder.layer.#.intermediate.dense.*", "layers.#.fc1.*"),
    ("layers.#.mlp.down.*", "esm.encoder.layer.#.output.dense.*", "layers.#.fc2.*"),
    ("norm.*", "esm.encoder.emb_layer_norm_after.*", "emb_layer_norm_after.*"),
    ("head.dense.*", "lm_head.dense.*", "lm_head.dense.*"),
    ("head.norm.*", "lm_head.layer_norm.*", "lm_head.layer_norm.*"),
    ("head.bias", "lm_head.bias", "lm_head.bias"),
    ("contact_head.*", "esm.contact_head.regression.*", "contact_head.regression.*"),
)
TIED = ("", "lm_head.decoder.weight", "lm_head.weight")  # the embedding once more
DROPPED = re.compile(r"inv_freq$|position_ids$|^esm\.pooler\.|^lm_head\.decoder\.bias$")  # nothing that we need


def rows(config: Any, column: int) -> list[Row]:
    """The table of one model. column: HUGGINGFACE or FAIR_ESM."""
    padding = pad_rows(0, pad_to(config.vocab_size) - config.vocab_size)
    changes = {
        "embed.weight": padding,
        "head.bias": padding,
        "embed_positions.weight": pad_rows(-UNUSED_POSITIONS, 0),
        "layers.#.attention.qkv.*": heads(config.num_heads),
    }
    result = []
    for row in TABLE:
        layers = range(config.num_layers) if "#" in row[0] else [0]
        for i, suffix in product(layers, ("weight", "bias") if "*" in row[0] else [""]):
            ours, theirs = (row[c].replace("#", str(i)).replace("*", suffix) for c in (0, column))
            result.append(Row(ours, tuple(theirs.split()), changes.get(row[0], SAME)))
    return result


def read_weights(config: Any, column: int, tensors: Mapping[str, Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor). Raises ValueError where the decoder is not tied, or as `read` does."""
    tied, embed = tensors.get(TIED[column]), tensors.get(TABLE[0][column])
    if tied is not None and embed is not None and not torch.equal(tied, embed):
        raise ValueError(f"{where}: {TIED[column]} is not the embedding; a decoder that is not tied is not supported")
    kept = {name: t for name, t in tensors.items() if name != TIED[column] and not DROPPED.search(name)}
    yield from read(rows(config, column), kept, where)


def normal_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under the names of EsmForMaskedLM: EsmModel lacks `esm.`, some files say gamma and beta."""
    prefix = "" if any(name.startswith("esm.") for name in tensors) else "esm."
    normal = {}
    for name, tensor in tensors.items():
        name = name if name.startswith("lm_head.") else prefix + name
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        normal[name] = tensor
    return normal


def position_type(theirs: Mapping[str, Any]) -> str | None:
    """What tells ESM-1b from ESM-2 in a config.json; None where it is no ESM's."""
    return theirs.get("position_embedding_type", "absolute") if theirs.get("model_type") == "esm" else None


# config.json of transformers: our field ← their field, and the value where the file does not say (transformers' own)
FIELDS = {
    "hidden_size": ("hidden_size", 768),
    "num_layers": ("num_hidden_layers", 12),
    "num_heads": ("num_attention_heads", 12),
    "ffn_size": ("intermediate_size", 3072),
    "vocab_size": ("vocab_size", None),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "token_dropout": ("token_dropout", False),
    "mask_id": ("mask_token_id", None),
    "init_std": ("initializer_range", 0.02),
}
# fields that must have one of these values (an absent field has the first)
REQUIRED: dict[str, tuple] = {
    "model_type": ("esm",),
    "vocab_size": (33,),
    "mask_token_id": (32,),
    "pad_token_id": (PAD_ID,),
    "cls_token_id": (0, None),
    "bos_token_id": (None, 0),
    "eos_token_id": (2, None),
    "hidden_act": ("gelu",),
    "vocab_list": (None, get_tokenizer(TOKENIZER).pieces),
    "tie_word_embeddings": (True,),
}
OFF = {
    "add_cross_attention", "chunk_size_feed_forward", "esmfold_config", "is_decoder", "is_encoder_decoder",
    "is_folding_model", "pruned_heads", "quantization_config", "rope_scaling",
}  # fmt: skip
BY_FAMILY = {"position_embedding_type", "emb_layer_norm_before", "rope_theta", "max_position_embeddings"}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def fields_from_hf(theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our fields that both families share. Raises ValueError, see `read_config`."""
    needed = ("vocab_size", "mask_token_id", "pad_token_id")
    kinds: Any = dict(required=REQUIRED, needed=needed, off=OFF, dropouts=DROPOUTS, neutral=BY_FAMILY)
    fields = read_config(theirs, where, fields=FIELDS, **kinds)
    max_positions = theirs.get("max_position_embeddings", 1026) - UNUSED_POSITIONS
    return fields | {"max_positions": max_positions, "tokenizer": TOKENIZER}


def fields_to_hf(config: Any) -> dict[str, Any]:
    constant = ("model_type", "pad_token_id", "eos_token_id", "hidden_act", "tie_word_embeddings")
    return {
        "architectures": ["EsmForMaskedLM"],
        "is_folding_model": False,
        **{name: REQUIRED[name][0] for name in constant},
        **{name: getattr(config, ours) for ours, (name, _) in FIELDS.items()},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.max_positions + UNUSED_POSITIONS,
    }


def fair_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under fair-esm's module names: the files have fairseq's `encoder.sentence_encoder.` before them."""
    return {re.sub(r"^(encoder\.)?(sentence_encoder\.)?", "", name): tensor for name, tensor in tensors.items()}


def fields_from_fair(arguments: argparse.Namespace) -> dict[str, Any]:
    """Our fields that both families share; some files say `encoder_` before a name."""
    theirs = {name.removeprefix("encoder_"): value for name, value in vars(arguments).items()}
    return {
        "hidden_size": theirs["embed_dim"],
        "num_layers": theirs["layers"],
        "num_heads": theirs["attention_heads"],
        "ffn_size": theirs.get("ffn_embed_dim", 4 * theirs["embed_dim"]),
        "token_dropout": bool(theirs.get("token_dropout", False)),
    }
