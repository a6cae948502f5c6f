"""Parallelism is applied to a model, never written into it; this is the only place that knows the order.

    model on meta ── pipeline ── context, tensor ── recompute ── compile ─┬─ sharded: FSDP2 ─────────────┬─ memory
                                                                          └─ one rank, tp: `compute_in` ─┘

FSDP2 wraps units, then the rest; elsewhere weights are cast when the model is called. Layers are swapped for FP8's
before all of it. Compile comes after recompute, so that it sees what is computed twice, and before FSDP2, so that the
hooks that gather weights stay outside of the compiled graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from moltron.config.schema import ParallelConfig
from moltron.layers.compiled import compile_by_row
from moltron.models.spec import ParallelPlan
from moltron.parallel.collectives import world_size
from moltron.parallel.context import enter_context, leave_context
from moltron.parallel.mesh import build_mesh, data_mesh, is_sharded
from moltron.parallel.peers import use_peers
from moltron.parallel.pipeline import Pipeline, matches, pipeline_of
from moltron.parallel.precision import DTYPES, compute_in, mixed_precision, swap_to_fp8
from moltron.parallel.recompute import recompute_units
from moltron.parallel.tensor import local, own_part, stacked, tensor_parallel


def units(model: nn.Module, plan: ParallelPlan) -> list[nn.Module]:
    """The modules that the plan's globs name, in the model's order; there must be some."""
    found = [module for name, module in model.named_modules() if matches(name, plan.units)]
    if not found:
        raise ValueError(f"the plan's globs {', '.join(plan.units)} name no module")
    return found


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
    fp8_recipe: str = "tensorwise",
) -> nn.Module:
    """Make a model on the meta device ready for `device` and the current world; its memory is not filled yet.

    Of a pipeline, the model that is returned has this rank's modules only, see `Pipeline.model`. precision: fp8 is bf16
    but for the products inside of the blocks.
    """
    config = config or ParallelConfig()
    if precision == "fp8":
        for glob in plan.units:
            swap_to_fp8([module for name, module in model.named_modules() if matches(name, [glob])], fp8_recipe)
        precision = "bf16"
    mesh = build_mesh(config, world_size(), device.type) if world_size() > 1 or config.cpu_offload else None
    dtype = next(model.parameters()).dtype if precision == "fp32" else DTYPES[precision]
    if mesh is None or not is_sharded(config, world_size()):
        _prepare_blocks(model, plan, config, compile, mesh)
        if precision != "fp32" or mesh is not None:
            methods = [name for name in plan.methods if hasattr(model, name)]
            compute_in(model, dtype, units(model, plan), ("forward", *methods))
        return model.to_empty(device=device)
    parts = [(model, model)]  # what is wrapped, what is in it
    if config.pp > 1:
        pipeline = Pipeline(model, plan, config, mesh["pp"], dtype)
        parts = [(stage, stage.model) for stage in pipeline.stages.values()]
    # logits are a view, rows that pad the vocabulary are cut off; nothing changes them in place, losses copy them
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    sharded = data_mesh(mesh)
    settings: Any = dict(
        mesh=sharded,
        mp_policy=mixed_precision(precision, config.reduce_dtype),
        **({"offload_policy": CPUOffloadPolicy()} if config.cpu_offload else {}),
    )
    for root, part in parts:
        _prepare_blocks(part, plan, config, compile, mesh)
        for module in (*units(part, plan), root):
            # what is around the units is small, and torch 2.11 would not gather it again: a model returns a dataclass
            again = config.reshard_after_forward and module is not root
            fully_shard(module, reshard_after_forward=again, **settings)
            for method in (name for name in plan.methods if hasattr(module, name)):
                register_fsdp_forward_method(module, method)
        root.to_empty(device="cpu" if config.cpu_offload else device)
    if device.type == "cuda" and not config.cpu_offload:
        reduced_at_once = config.reshard_after_forward and config.pp == 1  # each pack's gradients, as they are computed
        group = sharded.get_group(sharded.ndim - 1)  # the ranks that share one copy
        use_peers([root for root, _ in parts], group, device, DTYPES[precision] if reduced_at_once else None)
    return model


def _prepare_blocks(
    model: nn.Module, plan: ParallelPlan, config: ParallelConfig, compile: bool, mesh: DeviceMesh | None
) -> None:
    """All that comes before weights are cast or sharded."""
    first, norm = plan.context
    if mesh is not None and config.cp > 1:
        enter_context(model, first, mesh["cp"])
    if mesh is not None and config.tp > 1:
        tensor_parallel(model, plan.tensor, mesh["tp"])
    if mesh is not None and config.cp > 1:
        leave_context(model, norm, mesh["cp"])
    recompute_units(units(model, plan), config.recompute, config.recompute_every)
    if compile:
        compile_units(model, plan, around=config.tp * config.cp == 1)


def assign_full(parameter: nn.Parameter, value: Tensor) -> None:
    """Write a full tensor, equal on every rank, into a parameter that may be sharded. No communication."""
    with torch.no_grad():
        local(parameter.data).copy_(own_part(value, parameter))


def gather_stack(parts: Tensor, like: Tensor) -> Tensor:
    """This rank's parts of K tensors that are laid out as `like`, (K, …) → the whole tensors, in few collectives."""
    if not isinstance(like, DTensor):
        return parts
    shape, stride = torch.Size((len(parts), *like.shape)), (like.numel(), *like.stride())
    placements = [stacked(p) for p in like.placements]
    settings: Any = dict(run_check=False, shape=shape, stride=stride)
    return DTensor.from_local(parts, like.device_mesh, placements, **settings).full_tensor()


def reshard(model: nn.Module) -> None:
    """Drop gathered weights, which a forward without a backward leaves: parameters are the fp32 masters again."""
    pipeline = pipeline_of(model)
    for part in [model] if pipeline is None else pipeline.stages.values():
        for module in part.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def total_norm(model: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """The norm of all parameters, or of all their gradients, over all ranks: 0-dim. tensors: this rank's, by name."""
    pipeline = pipeline_of(model)
    copies = pipeline.copies if pipeline is not None else ()
    norm = torch.nn.utils.get_total_norm([x for name, x in tensors.items() if name not in copies])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norm if pipeline is None else pipeline.total_norm(norm)


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Whether the next backward reduces gradients over the ranks; off for all but the last micro-batch of a step.

    Where it does not, gathered weights stay for the next micro-batch.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)
        model.set_reshard_after_backward(enabled)
