"""Reference models with random weights, written by others: what ours must agree with.

A reference computes, for one sequence of ids, logits, every layer's hidden states and contacts, in its own words;
`folder` is what `load_pretrained` reads it from; `ours` renames its tensors (weights or gradients) to our names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moltron.models.registry import get_spec

VOCAB = 33
TINY = dict(hidden_size=48, num_layers=3, num_heads=4, ffn_size=96)
ESM2_8M = dict(hidden_size=320, num_layers=6, num_heads=20, ffn_size=1280)


@dataclass
class Reference:
    name: str
    module: nn.Module
    logits: Callable[[Tensor], Tensor]  # (L,) → (L, V)
    hiddens: Callable[[Tensor], list[Tensor]]  # (L,) → L+1 of (L, D)
    contacts: Callable[[Tensor], Tensor] | None  # (L,) → (L−2, L−2)
    save: Callable[[Path], Path]
    ours: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def randomise(module: nn.Module, seed: int = 0, std: float = 0.05) -> nn.Module:
    """Every parameter nonzero, biases and norms too: a swapped or forgotten one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if "norm" in name.lower() and name.endswith("weight") else noise * std)
    return module.eval()


def huggingface(position_type: str, sizes: dict[str, int], **options: Any) -> Reference:
    from transformers import EsmConfig, EsmForMaskedLM

    config = EsmConfig(
        vocab_size=VOCAB, mask_token_id=32, pad_token_id=1, hidden_size=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_heads"],
        intermediate_size=sizes["ffn_size"], position_embedding_type=position_type, max_position_embeddings=130,
        **({"layer_norm_eps": 1e-5, "token_dropout": True, "emb_layer_norm_before": False} | options),
    )  # fmt: skip
    config._attn_implementation = "eager"  # the one that gives attention maps
    model = randomise(EsmForMaskedLM(config))
    convert = get_spec("esm2" if position_type == "rotary" else "esm1").convert

    def save(folder: Path) -> Path:
        model.save_pretrained(folder)
        return folder

    return Reference(
        name=f"transformers {position_type}",
        module=model,
        logits=lambda ids: model(ids[None]).logits[0],
        hiddens=lambda ids: [h[0] for h in model(ids[None], output_hidden_states=True).hidden_states],
        contacts=lambda ids: model.predict_contacts(ids[None], torch.ones_like(ids[None]))[0],
        save=save,
        ours=lambda tensors: dict(convert.read_hf(config.to_dict(), tensors, "")[1]),
    )


def fair_esm2(sizes: dict[str, int]) -> Reference:
    from esm.model.esm2 import ESM2

    model = randomise(ESM2(sizes["num_layers"], sizes["hidden_size"], sizes["num_heads"], "ESM-1b", True))
    args = argparse.Namespace(
        encoder_layers=sizes["num_layers"], encoder_embed_dim=sizes["hidden_size"],
        encoder_attention_heads=sizes["num_heads"], token_dropout=True,
    )  # fmt: skip
    return _fair("fair-esm ESM-2", model, {"cfg": {"model": args}}, "esm2")


def fair_esm1b(sizes: dict[str, int]) -> Reference:
    import esm
    from esm.model.esm1 import ProteinBertModel

    args = argparse.Namespace(
        arch="roberta_large", layers=sizes["num_layers"], embed_dim=sizes["hidden_size"],
        ffn_embed_dim=sizes["ffn_size"], attention_heads=sizes["num_heads"], max_positions=128, token_dropout=True,
        emb_layer_norm_before=True,
    )  # fmt: skip
    model = randomise(ProteinBertModel(args, esm.Alphabet.from_architecture("ESM-1b")))
    with torch.no_grad():  # as fair-esm's own loader leaves it
        model.embed_tokens.weight[32] = 0
    return _fair("fair-esm ESM-1b", model, {"args": args}, "esm1")


def _fair(name: str, model: Any, header: dict[str, Any], family: str) -> Reference:
    def run(ids: Tensor) -> Any:
        return model(ids[None], repr_layers=range(len(model.layers) + 1))

    def save(folder: Path) -> Path:
        weights = {f"encoder.sentence_encoder.{k}": v for k, v in model.state_dict().items() if "contact_head" not in k}
        contacts = {k: v for k, v in model.state_dict().items() if "contact_head" in k}
        folder.mkdir(parents=True)
        torch.save({**header, "model": weights}, folder / "reference.pt")
        torch.save({"model": contacts}, folder / "reference-contact-regression.pt")
        return folder / "reference.pt"

    def ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        translated = dict(get_spec(family).convert.read_fair({**header, "model": dict(tensors)}, "")[1])
        translated["embed.weight"][:VOCAB] = tensors["embed_tokens.weight"]  # ESM-1b's reader zeroes the row of <mask>
        return translated

    return Reference(
        name=name,
        module=model,
        logits=lambda ids: run(ids)["logits"][0],
        hiddens=lambda ids: [h[0] for h in run(ids)["representations"].values()],
        contacts=lambda ids: model.predict_contacts(ids[None])[0],
        save=save,
        ours=ours,
    )


class Esm1nvReference(nn.Module):
    """ESM-1nv of torch's own layers: learned positions, pre-norm, tanh GELU, BERT head (spec models.md §2)."""

    def __init__(self, sizes: dict[str, int], max_positions: int = 128, vocab: int = 30):
        super().__init__()
        width = sizes["hidden_size"]
        gelu = nn.GELU(approximate="tanh")
        activation = partial(nn.functional.gelu, approximate="tanh")  # torch's fast path takes any nn.GELU for erf
        self.embed, self.positions = nn.Embedding(vocab, width), nn.Embedding(max_positions, width)
        layer = nn.TransformerEncoderLayer(
            width, sizes["num_heads"], sizes["ffn_size"], 0.0, activation, 1e-5, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, sizes["num_layers"], enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width, 1e-5)
        self.head = nn.Sequential(nn.Linear(width, width), gelu, nn.LayerNorm(width, 1e-5))
        self.bias = nn.Parameter(torch.zeros(vocab))

    def hiddens(self, ids: Tensor) -> list[Tensor]:
        x = self.embed(ids[None]) + self.positions(torch.arange(len(ids)))[None]
        states = [x]
        for layer in self.encoder.layers:
            x = layer(x)
            states.append(x)
        return [s[0] for s in (*states[:-1], self.norm(states[-1]))]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hiddens(ids)[-1]) @ self.embed.weight.T + self.bias


def esm1nv(sizes: dict[str, int]) -> Reference:
    model = randomise(Esm1nvReference(sizes))

    def ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        def heads(name: str) -> Tensor:  # torch has (q, k, v) × head, ours head × (q, k, v)
            return tensors[name].unflatten(0, (3, sizes["num_heads"], -1)).transpose(0, 1).flatten(0, 2)

        def padded(name: str) -> Tensor:
            return torch.cat([tensors[name], torch.zeros(64 - 30, *tensors[name].shape[1:])])

        renamed = {"embed.weight": padded("embed.weight"), "embed_positions.weight": tensors["positions.weight"]}
        renamed["head.bias"] = padded("bias")
        for ending in ("weight", "bias"):
            for i in range(sizes["num_layers"]):
                a, b = f"layers.{i}.", f"encoder.layers.{i}."
                renamed[f"{a}attention.qkv.{ending}"] = heads(f"{b}self_attn.in_proj_{ending}")
                for mine, torchs in [
                    ("attention_norm", "norm1"), ("attention.out", "self_attn.out_proj"), ("mlp_norm", "norm2"),
                    ("mlp.up", "linear1"), ("mlp.down", "linear2"),
                ]:  # fmt: skip
                    renamed[f"{a}{mine}.{ending}"] = tensors[f"{b}{torchs}.{ending}"]
            renamed[f"norm.{ending}"] = tensors[f"norm.{ending}"]
            renamed[f"head.dense.{ending}"] = tensors[f"head.0.{ending}"]
            renamed[f"head.norm.{ending}"] = tensors[f"head.2.{ending}"]
        return renamed

    def save(folder: Path) -> Path:
        from moltron.checkpoint.weights import save_pretrained

        spec = get_spec("esm1")
        config = spec.config(**sizes, max_positions=128)
        own = spec.model(config)
        own.load_state_dict(ours(model.state_dict()))
        save_pretrained(own, spec, config, folder, "moltron")
        return folder

    return Reference("torch ESM-1nv", model, model, model.hiddens, None, save, ours)


REFERENCES: dict[str, Callable[[], Reference]] = {
    "transformers ESM-2": lambda: huggingface("rotary", TINY),
    "transformers ESM-2 8M": lambda: huggingface("rotary", ESM2_8M),
    "transformers ESM-2, eps 1e-12, no token dropout": lambda: huggingface(
        "rotary", TINY, layer_norm_eps=1e-12, token_dropout=False
    ),
    "transformers ESM-1b": lambda: huggingface("absolute", TINY, emb_layer_norm_before=True),
    "fair-esm ESM-2": lambda: fair_esm2({**TINY, "ffn_size": 4 * TINY["hidden_size"]}),
    "fair-esm ESM-2 8M": lambda: fair_esm2(ESM2_8M),
    "fair-esm ESM-1b": lambda: fair_esm1b(TINY),
    "torch ESM-1nv": lambda: esm1nv(TINY),
}
