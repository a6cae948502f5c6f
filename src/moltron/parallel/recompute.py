"""Activations that are computed again in the backward pass instead of kept: memory for time.

    none         all are kept
    selective    matrix products and attention are kept, what is cheap to compute is not
    full         only a block's input is kept

Comes before compile, which then sees it, and before FSDP2. Numbers stay the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "selective", "full")
_KEPT = ("mm", "addmm", "bmm", "scaled_mm", "packed_attention", "scaled_dot_product", "all_gather", "reduce_scatter")


def recompute_units(units: Iterable[nn.Module], mode: str, every: int = 1) -> None:
    """In place: the forward of every `every`-th unit. mode: one of MODES."""
    if mode == "none":
        return
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    for unit in list(units)[every - 1 :: every]:
        unit.forward = _checkpointed(unit, unit.forward, contexts)  # type: ignore[method-assign]


def _policy(context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    name = str(operator).split("::")[-1].split(".")
    is_kept = any(part.lstrip("_").startswith(_KEPT) for part in name)
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointed(unit: nn.Module, forward: Callable[..., Any], contexts: dict[str, Any]) -> Callable[..., Any]:
    @wraps(forward)
    def call(*args: Any) -> Any:
        run = forward if torch.compiler.is_compiling() else _with_weights_of_now(unit, forward)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **contexts)

    return call


def _with_weights_of_now(unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` with what `unit` holds at this moment: in the backward, `compute_in` has put the masters back."""
    now = [(m, name, p) for m in unit.modules() for name, p in m._parameters.items()]
    if all(isinstance(p, nn.Parameter) or p is None for _, _, p in now):  # FSDP2 sees to it itself
        return forward

    def run(*args: Any) -> Any:
        later = [m._parameters[name] for m, name, _ in now]
        for m, name, p in now:
            m._parameters[name] = p
        try:
            return forward(*args)
        finally:
            for (m, name, _), p in zip(now, later, strict=True):
                m._parameters[name] = p

    return run
