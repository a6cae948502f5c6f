"""Tensor parallelism: the plan's words as torch's parallel styles, on modules that know nothing of it.

    tokens whole ──scatter──> T/tp tokens a rank ── norm ──column──> all tokens, N/tp heads ──row──> T/tp tokens …
                                                                                      … norm ──gather──> tokens whole

Between products each rank has its own tokens (Korthikanti et al. 2022, arXiv:2205.05198); embeddings and heads are
small, so every rank computes them whole. Weights become DTensors, replicated ones too: one optimizer sees one mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from moltron.layers.fp8 import Float8Linear


class Replicated(ParallelStyle):
    """Every rank computes the module whole, from the same input to the same output."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Any, ...]:
            return tuple(
                DTensor.from_local(x, mesh, (Replicate(),), run_check=False) if type(x) is Tensor else x for x in inputs
            )

        def leave(_: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
            return output.to_local(grad_placements=(Replicate(),))

        return distribute_module(module, device_mesh, None, enter, leave)  # type: ignore[arg-type]


class ScatterTokens(ParallelStyle):
    """Of the module's first input, which every rank has whole, each keeps its own tokens."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            whole = DTensor.from_local(inputs[0], device_mesh, (Replicate(),), run_check=False)
            return whole.redistribute(placements=(Shard(0),)).to_local(), *inputs[1:]

        module.register_forward_pre_hook(enter)
        return module


class _Column(Float8Linear):
    """All tokens with this rank's columns. FP8 products take plain tensors, so scales are of a rank's own part."""

    mesh: DeviceMesh

    def forward(self, input: Any) -> Any:
        bias = None if self.bias is None else local(self.bias)
        y = self.product(input.to_local(grad_placements=(Partial(),)), local(self.weight), bias)
        return DTensor.from_local(y, self.mesh, (Shard(y.ndim - 1),), run_check=False)


class _Row(Float8Linear):
    """This rank's part of a sum over ranks; the bias is shared out among them."""

    mesh: DeviceMesh

    def forward(self, input: Any) -> Any:
        bias: Any = self.bias
        bias = None if bias is None else bias.to_local(grad_placements=(Partial(),)) / self.mesh.size()
        y = self.product(input.to_local(), local(self.weight), bias)
        return DTensor.from_local(y, self.mesh, (Partial(),), run_check=False)


def _norm() -> ParallelStyle:
    return SequenceParallel(sequence_dim=0, use_local_output=True)


STYLES = {
    "replicate": lambda: [Replicated()],
    "scatter tokens": lambda: [ScatterTokens()],
    "norm": lambda: [_norm()],
    "norm, gather tokens": lambda: [
        _norm(),
        PrepareModuleOutput(output_layouts=Shard(0), desired_output_layouts=Replicate()),
    ],
    "column": lambda: [ColwiseParallel(input_layouts=Shard(0))],
    "column of whole": lambda: [ColwiseParallel(input_layouts=Replicate())],
    "row": lambda: [RowwiseParallel(output_layouts=Shard(0))],
}


def tensor_parallel(model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Cut the modules that the plan's globs name, in place. mesh: of one axis.

    The caller has seen to it that heads, feed-forward widths and tokens can be shared equally.
    """
    names = [name for name, _ in model.named_modules()]
    for glob, style in plan.items():
        for name in names:
            if name.count(".") == glob.count(".") and fnmatchcase(name, glob):
                module: Any = model.get_submodule(name)
                for applied in STYLES[style]():
                    parallelize_module(module, mesh, applied)
                if isinstance(module, Float8Linear):
                    module.__class__, module.mesh = _Row if style == "row" else _Column, mesh  # type: ignore[assignment]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded: a view."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def zeros_beside(like: Tensor, shape: tuple[int, int], part: Tensor) -> Tensor:
    """A matrix of `shape`, sharded as `like`, and on its device, not on the mesh's. part: as large as this rank's."""
    if not isinstance(like, DTensor):
        return torch.zeros_like(part)
    settings: Any = dict(run_check=False, shape=shape, stride=(shape[1], 1))
    on_meta = DTensor.from_local(part.to("meta"), like.device_mesh, like.placements, **settings)
    return torch.zeros_like(on_meta, device=part.device)


def own_part(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of `whole`, equal on every rank, laid out as `like`: a view, without communication.

    Where two axes share a dimension the last one, tensor parallelism, comes first: so FSDP2 lays them out.
    """
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    axes = list(zip(like.placements, coordinate, mesh.shape, strict=True))
    dims = [dim for placement, *_ in axes if (dim := _dim(placement)) is not None]
    if len(set(dims)) == len(dims) or any(hasattr(placement, "split_factor") for placement, *_ in axes):
        axes.reverse()
    for placement, index, ranks in axes:
        dim = _dim(placement)
        if dim is not None:
            size = whole.shape[dim]
            step = -(-size // ranks)
            begin = min(index * step, size)
            whole = whole.narrow(dim, begin, min(step, size - begin))
    return whole


def _dim(placement: Any) -> int | None:
    """The dimension that a placement shards."""
    return None if placement.is_replicate() else placement.dim


def stacked(placement: Any) -> Any:
    """The placement of a stack of tensors that have this one: one dimension further on."""
    if placement.is_replicate():
        return placement
    factor = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + 1, **factor)
