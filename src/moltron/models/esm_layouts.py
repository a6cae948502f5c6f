"""ESM-1b and ESM-2 elsewhere: the parameter names of `transformers` and fair-esm, and what their configurations mean.

One table serves both families; their convert.py add what differs. Sources: transformers' EsmForMaskedLM (4.25 to 5.x),
fair-esm's ESM2 and ProteinBertModel and the checkpoints published with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from moltron.models.encoder import pad_to
from moltron.models.weightmap import Layout, Row, cut_rows, merge_heads, pad_rows, split_heads
from moltron.tokenizers.residues import get_tokenizer

log = logging.getLogger(__name__)

PAD_ID = 1  # both other layouts count positions from PAD_ID + 1: two rows of the table are never used
TOKENIZER = "esm2"  # ESM-1b and ESM-2 share one vocabulary

# ours, transformers', fair-esm's; each of them a module with a weight and a bias
IN_A_LAYER = (
    ("attention_norm", "attention.LayerNorm", "self_attn_layer_norm"),
    ("attention.out", "attention.output.dense", "self_attn.out_proj"),
    ("mlp_norm", "LayerNorm", "final_layer_norm"),
    ("mlp.up", "intermediate.dense", "fc1"),
    ("mlp.down", "output.dense", "fc2"),
)
QKV = (
    "attention.qkv",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
)
LAYER = ("layers.{}", "esm.encoder.layer.{}", "layers.{}")
OUTSIDE = (
    ("embed_norm", "esm.embeddings.layer_norm", "emb_layer_norm_before"),
    ("norm", "esm.encoder.emb_layer_norm_after", "emb_layer_norm_after"),
    ("head.dense", "lm_head.dense", "lm_head.dense"),
    ("head.norm", "lm_head.layer_norm", "lm_head.layer_norm"),
    ("contact_head", "esm.contact_head.regression", "contact_head.regression"),
)
EMBED = ("embed.weight", "esm.embeddings.word_embeddings.weight", "embed_tokens.weight")
POSITIONS = ("embed_positions.weight", "esm.embeddings.position_embeddings.weight", "embed_positions.weight")
BIAS = ("head.bias", "lm_head.bias", "lm_head.bias")
DECODER = ("", "lm_head.decoder.weight", "lm_head.weight")
DROPPED = (r"inv_freq$", r"position_ids$", r"^esm\.pooler\.", r"^lm_head\.decoder\.bias$")

HUGGINGFACE, FAIR_ESM = 1, 2


def layout(config: Any, column: int, skip: tuple[str, ...] = ()) -> Layout:
    """The table of one model. column: HUGGINGFACE or FAIR_ESM; skip: modules of OUTSIDE that this model lacks."""
    padding = pad_to(config.vocab_size) - config.vocab_size
    vocab = {"merge": pad_rows(0, padding), "split": cut_rows(0, padding)}
    heads = {"merge": merge_heads(config.num_heads), "split": split_heads(config.num_heads)}
    rows = [Row(EMBED[0], (EMBED[column],), **vocab)]
    if "embed_positions" not in skip:
        offset = PAD_ID + 1
        rows.append(Row(POSITIONS[0], (POSITIONS[column],), merge=pad_rows(-offset, 0), split=cut_rows(-offset, 0)))
    for i in range(config.num_layers):
        ours, theirs = LAYER[0].format(i), LAYER[column].format(i)
        for suffix in ("weight", "bias"):
            parts = tuple(f"{theirs}.{part}.{suffix}" for part in QKV[column])
            rows.append(Row(f"{ours}.{QKV[0]}.{suffix}", parts, **heads))
            rows += [Row(f"{ours}.{r[0]}.{suffix}", (f"{theirs}.{r[column]}.{suffix}",)) for r in IN_A_LAYER]
    for module in OUTSIDE:
        if module[0] not in skip:
            optional = module[0].startswith(("contact_head", "head."))
            rows += [
                Row(f"{module[0]}.{suffix}", (f"{module[column]}.{suffix}",), optional=optional)
                for suffix in ("weight", "bias")
            ]
    rows.append(Row(BIAS[0], (BIAS[column],), optional=True, **vocab))
    return Layout(tuple(rows), {DECODER[column]: EMBED[column]}, DROPPED)


# ------------------------------------------------------------------------------------------------------- transformers


def normal_names(theirs: Mapping[str, Any]) -> dict[str, str]:
    """Names as EsmForMaskedLM has them → names as they are: EsmModel lacks `esm.`, some files say gamma and beta."""
    prefix = "" if any(name.startswith("esm.") for name in theirs) else "esm."
    names = {}
    for name in theirs:
        normal = name if name.startswith("lm_head.") else prefix + name
        normal = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", normal)
        names[re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", normal)] = name
    return names


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
    "pad_token_id": (1,),
    "cls_token_id": (0, None),
    "bos_token_id": (None, 0),
    "eos_token_id": (2, None),
    "hidden_act": ("gelu",),
    "is_folding_model": (False, None),
    "esmfold_config": (None,),
    "vocab_list": (None, get_tokenizer(TOKENIZER).pieces),
    "is_decoder": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False, None),
    "tie_word_embeddings": (True,),
    "chunk_size_feed_forward": (0,),
    "pruned_heads": ({}, None),
    "rope_scaling": (None,),
    "quantization_config": (None,),
}
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
NEUTRAL = {
    "_name_or_path", "architectures", "dtype", "gradient_checkpointing", "id2label", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip


def fields_from_hf(theirs: Mapping[str, Any], handled: tuple[str, ...], where: str) -> dict[str, Any]:
    """Our fields that both families share. handled: their fields that the family reads itself.

    Every field is honoured, known to change nothing, or refused by name: ValueError lists all problems.
    """
    known = {field for field, _ in FIELDS.values()} | set(REQUIRED) | set(DROPOUTS) | NEUTRAL | set(handled)
    problems = [
        f"{name}={theirs[name]!r} is supported only as {values[0]!r}"
        for name, values in REQUIRED.items()
        if name in theirs and theirs[name] not in values
    ]
    problems += [f"{name} is missing" for name in ("vocab_size", "mask_token_id", "pad_token_id") if name not in theirs]
    problems += [f"{name}={theirs[name]!r} is not a known field" for name in sorted(set(theirs) - known)]
    if problems:
        raise ValueError(f"{where}/config.json: {'; '.join(problems)}")
    active = [name for name in DROPOUTS if theirs.get(name)]
    if active:
        log.info("%s: %s not applied in training: moltron's ESM has no dropout", where, ", ".join(active))
    return {ours: theirs.get(name, default) for ours, (name, default) in FIELDS.items()} | {"tokenizer": TOKENIZER}


def fields_to_hf(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["EsmForMaskedLM"],
        **{name: values[0] for name, values in REQUIRED.items() if name in ALWAYS_WRITTEN},
        **{name: getattr(config, ours) for ours, (name, _) in FIELDS.items()},
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": config.max_positions + PAD_ID + 1,
    }


ALWAYS_WRITTEN = ("model_type", "pad_token_id", "eos_token_id", "hidden_act", "is_folding_model", "tie_word_embeddings")

# ----------------------------------------------------------------------------------------------------------- fair-esm

FAIR_PREFIX = re.compile(r"^(encoder\.)?(sentence_encoder\.)?")


def fair_names(theirs: Mapping[str, Any]) -> dict[str, str]:
    """fair-esm's module names → the names in the file, which has fairseq's `encoder.sentence_encoder.` before them."""
    return {FAIR_PREFIX.sub("", name): name for name in theirs}
