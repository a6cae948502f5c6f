"""One record per model family: everything the rest of the house needs to know of it.

Names of tokenizers and objectives are strings, plans are tables of strings: this room imports neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from moltron.models.weightmap import Conversion


@dataclass(frozen=True)
class ParallelPlan:
    """How a model is cut, in globs over module names. Each match of `units` is one FSDP unit and compiled.

    compiled: what else is, where no axis cuts sequences or heads; what a model does not have is passed over.
    methods: what else than forward is called on the model and on its units, and so has to gather weights first.
    tensor: how tensor parallelism cuts a module (`parallel.tensor.STYLES`); what a model does not have is passed over.
    context: between which modules context parallelism shares tokens: the first block, the norm behind the last.
    stages: all modules in the forward's order, as pipeline stages share them out: each begins with a block (a match of
        `units`). A model does without what others hold.
    copied: modules that several stages read, and the glob of what reads them there: each such stage has a copy, whose
        gradients are added up.
    """

    units: tuple[str, ...]
    compiled: tuple[str, ...] = ("norm", "head")
    methods: tuple[str, ...] = ()
    tensor: Mapping[str, str] = field(default_factory=dict)
    context: tuple[str, str] = ("layers.0", "norm")
    stages: tuple[str, ...] = ()
    copied: Mapping[str, str] = field(default_factory=dict)


def block_plan(blocks: str, crosses: bool = False) -> dict[str, str]:
    """`ParallelPlan.tensor` of pre-norm blocks: heads and feed-forward are cut, tokens between them. blocks: a glob."""
    cross = {"cross_norm": "norm", "cross_attention.query": "column", "cross_attention.kv": "column of whole"}
    plan = {"attention_norm": "norm", "attention.qkv": "column", "attention.out": "row"}
    plan |= cross | {"cross_attention.out": "row"} if crosses else {}
    plan |= {"mlp_norm": "norm", "mlp.up": "column", "mlp.down": "row"}
    return {f"{blocks}.{name}": style for name, style in plan.items()}


@dataclass(frozen=True)
class ModelSpec:
    """A model family.

    config: frozen dataclass of the architecture, all fields plain values (they go to config.json as they are);
        has `vocab_size`, `hidden_size`, `num_layers`, `max_positions`, `positions_end` (whether there are none beyond)
        and `tokenizer` (a name that `moltron.tokenizers.get_tokenizer` knows). A field's metadata may say `least`, the
        smallest int (else 1), and `choices`.
    model: config → nn.Module, with `forward(batch, hidden_layers=()) -> Output`, `logits(hidden) -> (…, V)`,
        `init_weights(seed)`, `flops(batch)`; encoder–decoders also `encode`, `start`, `step` (encoder_decoder.py).
    convert: how its weights and configuration look in `transformers` and elsewhere, both ways.
    objectives: names of `moltron.objectives`, the first is the default.
    """

    name: str
    config: type
    model: Callable[[Any], nn.Module]
    plan: ParallelPlan
    objectives: tuple[str, ...]
    convert: Conversion


def num_parameters(model: nn.Module) -> int:
    """Parameters as the spec counts them: the contact head, which training leaves alone, is left out."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("contact_head."))
