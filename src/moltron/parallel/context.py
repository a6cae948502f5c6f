"""Context parallelism: the ranks of one axis share the tokens of each pack, for sequences too long for one of them.

    batch ──layout.share──> first block: own tokens … attention: keys and values gathered … last norm ──> all tokens

Embeddings before and heads after are computed whole by every rank. FSDP2 takes the mean over these ranks, too: a
gather hands back the sum of their gradients, so that the mean of what each adds is the gradient.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_tensor_autograd
from torch.distributed.device_mesh import DeviceMesh

from moltron.layers.layout import Layout, Share


def share_of(layout: Layout, index: int, ranks: int, gather: Any) -> Share:
    """The share of rank `index`: as many tokens as every other, one after another."""
    size = int(layout.positions.shape[0]) // ranks
    start, stop = index * size, (index + 1) * size
    ends = np.cumsum(np.array(layout.lengths, dtype=np.int64))
    starts = ends - np.array(layout.lengths, dtype=np.int64)
    here = np.clip(np.minimum(ends, stop) - np.maximum(starts, start), 0, None)
    before = np.where(here > 0, np.clip(start - starts, 0, None), 0)
    queries = Layout.of(here).but(offsets=tuple(before.tolist()) if before.any() else None)
    return Share(start, stop, queries.each(lambda x: x.to(layout.positions.device)), gather)


def enter_context(model: nn.Module, first: str, mesh: DeviceMesh) -> None:
    """Before tensor parallelism. first: name of the first block. mesh: of one axis."""
    index, ranks = mesh.get_local_rank(), mesh.size()
    gather = partial(all_gather_tensor_autograd, gather_dim=0, group=mesh)

    def share(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        batch, *more = inputs
        return replace(batch, layout=batch.layout.but(share=share_of(batch.layout, index, ranks, gather))), *more

    def own(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_TD, layout, *more = inputs
        return x_TD[layout.share.start : layout.share.stop], layout, *more

    model.register_forward_pre_hook(share)
    if (block := submodule(model, first)) is not None:
        block.register_forward_pre_hook(own)


def leave_context(model: nn.Module, norm: str, mesh: DeviceMesh) -> None:
    """After tensor parallelism. norm: name of the norm behind the last block."""

    def whole(_: nn.Module, __: tuple[Any, ...], x_TD: Tensor) -> Tensor:
        return all_gather_tensor_autograd(x_TD, gather_dim=0, group=mesh)

    if (last := submodule(model, norm)) is not None:
        last.register_forward_hook(whole)


def submodule(model: nn.Module, name: str) -> nn.Module | None:
    """None where a pipeline stage does not have it."""
    return dict(model.named_modules()).get(name)
