"""ProtT5-XL's weights and configuration in `transformers`: T5ForConditionalGeneration, T5EncoderModel.

Sources: transformers' T5 (4.x, and 5.x, which writes scale_decoder_outputs) and its checkpoints. ProtT5nv has no
counterpart there: its LayerNorms and learned positions are no T5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moltron.models.prott5.model import ProtT5Config
from moltron.models.weightmap import SAME, Conversion, Row, Weights, heads, read, read_config, write

# Ours, theirs, of one block. #: 1 in an encoder, 2 in a decoder, whose blocks have the rows of CROSS as well.
BLOCK = (
    ("attention_norm", "layer.0.layer_norm"),
    ("attention.qkv", "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v"),
    ("attention.out", "layer.0.SelfAttention.o"),
    ("mlp_norm", "layer.#.layer_norm"),
    ("mlp.up", "layer.#.DenseReluDense.wi"),
    ("mlp.down", "layer.#.DenseReluDense.wo"),
)
CROSS = (
    ("cross_norm", "layer.1.layer_norm"),
    ("cross_attention.query", "layer.1.EncDecAttention.q"),
    ("cross_attention.kv", "layer.1.EncDecAttention.k layer.1.EncDecAttention.v"),
    ("cross_attention.out", "layer.1.EncDecAttention.o"),
)
EMBED, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the embedding
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old files; never read
RELATIVE_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"  # the first block's is all blocks'


def rows(config: ProtT5Config) -> list[Row]:
    result = [Row("embed.weight", (EMBED,))]
    if config.num_decoder_layers and not config.tied_head:
        result.append(Row("head.weight", (HEAD,)))
    stacks = (("encoder", config.num_layers, BLOCK, "1"), ("decoder", config.num_decoder_layers, BLOCK + CROSS, "2"))
    for stack, depth, table, mlp in stacks:
        if depth:
            result.append(Row(f"{stack}.norm.weight", (f"{stack}.final_layer_norm.weight",)))
            result.append(Row(f"{stack}.relative_bias.weight", (RELATIVE_BIAS.format(stack),)))
        for i in range(depth):
            for ours, theirs in table:
                names = tuple(f"{stack}.block.{i}.{name}.weight" for name in theirs.replace("#", mlp).split())
                change = SAME if len(names) == 1 else heads(config.num_heads, len(names))
                result.append(Row(f"{stack}.layers.{i}.{ours}.weight", names, change))
    return result


# config.json: our field ← their field, and the value where the file does not say (transformers' own)
FIELDS = {
    "hidden_size": ("d_model", 512),
    "num_layers": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "head_dim": ("d_kv", 64),
    "ffn_size": ("d_ff", 2048),
    "vocab_size": ("vocab_size", None),
    "norm_eps": ("layer_norm_epsilon", 1e-6),
    "relative_buckets": ("relative_attention_num_buckets", 32),
    "relative_reach": ("relative_attention_max_distance", 128),
    "max_positions": ("n_positions", 512),
}
# fields that must have one of these values (an absent field has the first)
REQUIRED: dict[str, tuple] = {
    "model_type": ("t5",),
    "vocab_size": (128,),
    "feed_forward_proj": ("relu",),
    "dense_act_fn": ("relu",),
    "pad_token_id": (0,),
    "eos_token_id": (1,),
    "decoder_start_token_id": (0, None),
    "bos_token_id": (None, 0),
}
OFF = {
    "add_cross_attention", "chunk_size_feed_forward", "cross_attention_hidden_size", "is_decoder", "is_gated_act",
    "pruned_heads", "quantization_config", "tie_encoder_decoder",
}  # fmt: skip
DROPOUTS = ("dropout_rate", "classifier_dropout")
NEUTRAL = {  # or read below
    "initializer_factor", "is_encoder_decoder", "num_decoder_layers", "output_past", "scale_decoder_outputs",
    "task_specific_params", "tie_word_embeddings",
}  # fmt: skip


def read_hf(theirs: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Weights:
    """Without tensors of a decoder (T5EncoderModel), an encoder alone."""
    if str(theirs.get("feed_forward_proj", "relu")).startswith("gated"):
        raise ValueError(
            f"{where}/config.json: feed_forward_proj={theirs['feed_forward_proj']!r}: this is a T5 1.1, whose gated "
            "feed-forward layers ProtT5-XL does not have and moltron does not read"
        )
    kinds: Any = dict(required=REQUIRED, needed=("vocab_size",), off=OFF, dropouts=DROPOUTS, neutral=NEUTRAL)
    fields = read_config(theirs, where, fields=FIELDS, **kinds)
    depth = theirs.get("num_decoder_layers") or fields["num_layers"]
    has_decoder = any(name.startswith("decoder.block.") for name in tensors)
    tensors, tied = _one_embedding(theirs, dict(tensors), where)
    config = ProtT5Config(
        **fields, num_decoder_layers=depth if has_decoder else 0, tokenizer="prott5", architecture="t5", tied_head=tied
    )
    return config, read(rows(config), tensors, where)


def _one_embedding(theirs: Mapping[str, Any], tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], bool]:
    """The tensors under one name each, and whether the head is the embedding (and then scaled)."""
    tensors.pop(UNUSED, None)
    copies = {name: tensors.pop(name) for name in COPIES if name in tensors}
    if EMBED not in tensors and copies:
        tensors[EMBED] = next(iter(copies.values()))
    for name, tensor in copies.items():
        if not torch.equal(tensor, tensors[EMBED]):
            raise ValueError(f"{where}: {name} is not {EMBED}; stacks with embeddings of their own are not supported")
    tied = theirs.get("tie_word_embeddings") is not False and theirs.get("scale_decoder_outputs") is not False
    if tied and HEAD in tensors and not torch.equal(tensors.pop(HEAD), tensors[EMBED]):
        raise ValueError(f"{where}: {HEAD} is not {EMBED}, which tie_word_embeddings in config.json says it is")
    if "scale_decoder_outputs" in theirs and not tied:  # transformers 5 leaves the head out where it is tied
        tensors.setdefault(HEAD, tensors[EMBED])
    return tensors, tied


def write_hf(config: ProtT5Config, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if config.architecture != "t5":
        raise ValueError("transformers has no T5 with LayerNorm and learned positions (ProtT5nv): use format=moltron")
    if config.tokenizer != "prott5":
        raise ValueError(f"the ids of tokenizer {config.tokenizer} are not those of a T5 folder: use format=moltron")
    theirs = {name: getattr(config, ours) for ours, (name, _) in FIELDS.items()}
    theirs["d_kv"] = config.head_dim or config.hidden_size // config.num_heads
    constant = ("model_type", "feed_forward_proj", "pad_token_id", "eos_token_id", "decoder_start_token_id")
    return {
        "architectures": ["T5ForConditionalGeneration" if config.num_decoder_layers else "T5EncoderModel"],
        **theirs,
        **{name: REQUIRED[name][0] for name in constant},
        "num_decoder_layers": config.num_decoder_layers or config.num_layers,
        "is_encoder_decoder": True,
        "tie_word_embeddings": config.tied_head,
        "dropout_rate": 0.0,
    }, write(rows(config), tensors)


CONVERSION = Conversion(is_hf=lambda theirs: theirs.get("model_type") == "t5", read_hf=read_hf, write_hf=write_hf)
