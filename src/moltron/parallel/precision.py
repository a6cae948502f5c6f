"""Precision as a policy: fp32 master weights; what is gathered, computed and reduced is decided here.

    sharded          FSDP2 gathers weights in half precision (`mixed_precision`)
    not sharded      `compute_in`: the masters are cast when the model is called, and their gradients back
    fp8              bf16, and `swap_to_fp8`: what linear layers inside of the blocks get is cast once more
    optim.state=fp8  AdamW's moments of matrices that `fits_fp8`, whatever the rest is

Statistics, softmax and losses stay in fp32 in the models themselves; no autocast anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from moltron.layers.fp8 import Float8Linear
from moltron.parallel.tensor import local

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAINED = (*DTYPES, "fp8")  # only training knows FP8
REDUCED = ("fp32", "bf16")  # what gradients may be added up in
BLOCK = 64  # columns of a row whose FP8 moments share a scale


def resolve_precision(precision: str, device: torch.device, known: Sequence[str] = tuple(DTYPES)) -> str:
    """auto → bf16 on CUDA, fp32 on a CPU. known: what may be asked for by name, see TRAINED."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in known:
        raise ValueError(f"precision={precision!r} is unknown; there are: auto, {', '.join(known)}")
    return precision


def fits_fp8(shape: Sequence[int]) -> bool:
    """Whether optim.state=fp8 is for parameters of this shape: the whole one, so that all layouts have one state.

    Not for small ones, where it would save nothing.
    """
    return len(shape) == 2 and shape[1] % BLOCK == 0 and shape[0] * shape[1] >= 4096


def swap_to_fp8(blocks: Sequence[nn.Module], recipe: str) -> None:
    """In place: the linear layers of a stack's blocks, but of the first and the last, which errors hurt most."""
    for module in (module for block in blocks[1:-1] for module in block.modules()):
        if type(module) is nn.Linear:
            Float8Linear.swap(module, recipe)


def mixed_precision(precision: str, reduce: str) -> MixedPrecisionPolicy:
    """Gather and compute in `precision`, add up gradients in `reduce`.

    Inputs are not cast: the hidden state has the dtype of the embedding's weights, thus `precision`, and rotary tables
    stay in fp32, where bf16 would be off by up to 2⁻⁹ of each cosine and sine.
    """
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(DTYPES[precision], reduce_dtype=DTYPES[reduce], cast_forward_inputs=False)


def compute_in(model: nn.Module, dtype: torch.dtype, units: Iterable[nn.Module], methods: Iterable[str]) -> None:
    """Let `model` compute in `dtype`, whatever its parameters are kept in; gradients come in theirs.

    While one of `methods` runs, every module finds copies of its weights in `dtype`, made in one kernel for each of
    `units` and one for the rest. No hooks, no streams: unlike FSDP2's, such a step can become a CUDA graph. Of tensor
    parallelism's gradients, those that are sums over ranks are added up in one collective for each of `units`.
    """
    owned: set[nn.Module] = set()
    groups = []
    for unit in (*units, model):
        modules = [module for module in unit.modules() if module not in owned]
        owned.update(modules)
        groups.append([(m, name) for m in modules for name, p in m.named_parameters(recurse=False) if p.requires_grad])
    frozen = [(m, name) for m in owned for name, p in m.named_parameters(recurse=False) if not p.requires_grad]
    inside = False

    def cast() -> list[tuple[nn.Module, str, nn.Parameter]]:
        kept = [(m, name, m._parameters[name]) for group in (*groups, frozen) for m, name in group]
        for group in groups:
            halves = _Cast.apply(dtype, *(m._parameters[name] for m, name in group))
            for (m, name), half in zip(group, halves, strict=True):  # type: ignore[arg-type]
                m._parameters[name] = half
        for m, name in frozen:
            m._parameters[name] = m._parameters[name].to(dtype)  # type: ignore[union-attr,assignment]
        return kept  # type: ignore[return-value]

    def casting(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal inside
            if inside:  # one method calls another
                return method(*args, **settings)
            kept, inside = cast(), True
            try:
                return method(*args, **settings)
            finally:
                inside = False
                for m, name, parameter in kept:
                    m._parameters[name] = parameter

        return call

    for name in methods:
        setattr(model, name, casting(getattr(model, name)))


class _Cast(torch.autograd.Function):
    """Copies of tensors in another dtype; gradients laid out as the tensors, in their dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.weights = weights
        return tuple(map(_as, _copies(weights, [dtype] * len(weights)), weights))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        parts = _copies(gradients, [weight.dtype for weight in ctx.weights])
        pairs = zip(parts, gradients, ctx.weights, strict=True)
        _add_up([x for x, g, w in pairs if _is_sum(g, w)], ctx.weights[0])
        return None, *map(_as, parts, ctx.weights)


def _copies(tensors: Iterable[Tensor], dtypes: list[torch.dtype]) -> list[Tensor]:
    """Of this rank's parts."""
    parts = [local(x) for x in tensors]
    copies = [torch.empty_like(x, dtype=dtype) for x, dtype in zip(parts, dtypes, strict=True)]
    torch._foreach_copy_(copies, parts)
    return copies


def _as(part: Tensor, like: Tensor) -> Tensor:
    """What this rank's part of it is, laid out as another tensor."""
    if not isinstance(like, DTensor):
        return part
    settings: Any = dict(run_check=False, shape=like.shape, stride=like.stride())
    return DTensor.from_local(part, like.device_mesh, like.placements, **settings)


def _is_sum(gradient: Tensor, weight: Tensor) -> bool:
    """Whether each rank has a part of a sum only. Plans make no other gradient that is not laid out as its weight."""
    if not isinstance(gradient, DTensor) or gradient.placements == weight.placements:  # type: ignore[attr-defined]
        return False
    assert all(p.is_partial() for p in gradient.placements), (gradient.placements, weight.shape)
    return True


def _add_up(tensors: list[Tensor], like: Tensor) -> None:
    """In place, over the ranks of a DTensor's mesh."""
    if tensors:
        flat = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(flat, group=like.device_mesh.get_group())  # type: ignore[attr-defined]
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))
