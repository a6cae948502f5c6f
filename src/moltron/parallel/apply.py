"""Parallelism is applied to a model, never written into it; this is the only place that knows the order.

    model on meta ── context, tensor ── recompute ── compile ─┬─ several ranks: FSDP2, units, then rest ─┬─ memory
                                                              └─ one rank: weights cast by `compute_in` ─┘

Compile comes after recompute, so that it sees what is computed twice, and before FSDP2, so that the hooks that gather
weights stay outside of the compiled graphs.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from moltron.config.schema import ParallelConfig
from moltron.layers.compiled import compile_by_row
from moltron.models.spec import ParallelPlan
from moltron.parallel.collectives import world_size
from moltron.parallel.context import enter_context, leave_context
from moltron.parallel.mesh import build_mesh, data_mesh
from moltron.parallel.precision import DTYPES, compute_in, mixed_precision
from moltron.parallel.recompute import recompute_units
from moltron.parallel.tensor import own_part, stacked, tensor_parallel


def units(model: nn.Module, plan: ParallelPlan) -> list[nn.Module]:
    """The modules that the plan's globs name, in the model's order. A glob that hits nothing is an error."""
    found = {name: module for name, module in model.named_modules() for glob in plan.units if _matches(name, glob)}
    for glob in plan.units:
        if not any(_matches(name, glob) for name in found):
            raise ValueError(f"the plan's glob {glob!r} names no module")
    return list(found.values())


def _matches(name: str, glob: str) -> bool:
    return name.count(".") == glob.count(".") and fnmatchcase(name, glob)


def compile_units(model: nn.Module, plan: ParallelPlan, around: bool = True) -> None:
    """torch.compile each unit in place: equal blocks share one compilation. around: what is around them, too."""
    for unit in units(model, plan):
        unit.compile(fullgraph=True)
    for name, module in model.named_modules():
        if around and name in plan.compiled and next(module.parameters(), None) is not None:
            module.forward = compile_by_row(module.forward)  # type: ignore[method-assign]


def parallelize(
    model: nn.Module,
    plan: ParallelPlan,
    device: torch.device,
    *,
    precision: str,
    compile: bool,
    config: ParallelConfig | None = None,
) -> nn.Module:
    """Make a model on the meta device ready for `device` and the current world; its memory is not filled yet."""
    config, mesh = config or ParallelConfig(), None
    if world_size() > 1:
        mesh = build_mesh(config, world_size(), device.type)
        first, norm = plan.context
        if config.cp > 1:
            enter_context(model, first, mesh["cp"])
        if config.tp > 1:
            tensor_parallel(model, plan.tensor, mesh["tp"])
        if config.cp > 1:
            leave_context(model, norm, mesh["cp"])
    recompute_units(units(model, plan), config.recompute, config.recompute_every)
    if compile:
        compile_units(model, plan, around=config.tp * config.cp == 1)
    methods = [name for name in plan.methods if hasattr(model, name)]
    if mesh is None and precision != "fp32":
        compute_in(model, DTYPES[precision], units(model, plan), ("forward", *methods))
    elif mesh is not None:
        settings: dict[str, Any] = dict(
            mesh=data_mesh(mesh),
            mp_policy=mixed_precision(precision),
            reshard_after_forward=config.reshard_after_forward,
        )
        for module in (*units(model, plan), model):
            fully_shard(module, **settings)
            for method in (name for name in plan.methods if hasattr(module, name)):
                register_fsdp_forward_method(module, method)
    return model.to_empty(device=device)


def assign_full(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a full tensor, equal on every rank, into a parameter that may be sharded. No communication."""
    with torch.no_grad():
        local(parameter.data).copy_(own_part(value, parameter))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_stack(parts: Tensor, like: Tensor) -> Tensor:
    """This rank's parts of K tensors that are laid out as `like`, (K, …) → the whole tensors, in few collectives."""
    if not isinstance(like, DTensor):
        return parts
    shape, stride = torch.Size((len(parts), *like.shape)), (like.numel(), *like.stride())
    placements = [stacked(p) for p in like.placements]
    settings: Any = dict(run_check=False, shape=shape, stride=stride)
    return DTensor.from_local(parts, like.device_mesh, placements, **settings).full_tensor()


def load_full_state(model: nn.Module, state: Iterable[tuple[str, Tensor]]) -> None:
    """Fill every parameter from (name, full tensor) pairs; a name too many or too few is an error."""
    parameters = dict(model.named_parameters())
    for name, value in state:
        if name not in parameters:
            raise ValueError(f"the model has no parameter {name!r}")
        assign_full(parameters.pop(name), value)
    if parameters:
        raise ValueError(f"no weights for {', '.join(sorted(parameters))}")


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, which a forward without a backward leaves: parameters are the fp32 masters again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the ranks; off for all but the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
