"""Forward and backward of a pack as one CUDA graph: a launch instead of hundreds, so that no GPU waits for Python.

    1st pack of a shape ──as usual: compiles──> loss      2nd ──recorded──> graph      2nd, 3rd … ──replayed──> loss

Every pack is computed once, whichever way. Gradients are added to the parameters' own `grad`, which must stay where
they are from the first pack on. Knows nothing of models, losses and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moltron.models.batch import PackedBatch

Backward = Callable[[PackedBatch, Tensor], Tensor]


class GraphedBackward:
    """As `backward(batch, scale) → loss`, of tensors on one CUDA device that may still be on their way there."""

    def __init__(self, backward: Backward, device: torch.device):
        self.backward, self.device = backward, device
        self.recordings: dict[Any, tuple[torch.cuda.CUDAGraph, PackedBatch, Tensor, Tensor] | None] = {}
        self.stream = torch.cuda.Stream(device)  # autograd wants one stream for all that is ever recorded
        self.pool = torch.cuda.graph_pool_handle()  # of all recordings: only one runs at a time

    def __call__(self, batch: PackedBatch, scale: Tensor) -> Tensor:
        shape = tuple(x.shape for x in batch.tensors())
        if shape not in self.recordings:
            self.recordings[shape] = None
            return self._now(batch.to(self.device, non_blocking=True), scale)
        recording = self.recordings[shape]
        if recording is None:
            recording = self.recordings[shape] = self._record(batch.to(self.device), scale.clone())
        graph, static, static_scale, loss = recording
        for old, new in zip(static.tensors(), batch.tensors(), strict=True):
            old.copy_(new, non_blocking=True)
        static_scale.copy_(scale)
        graph.replay()
        return loss.clone()

    def _now(self, batch: PackedBatch, scale: Tensor) -> Tensor:
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            loss = self.backward(batch, scale)
        here.wait_stream(self.stream)
        return loss

    def _record(self, batch: PackedBatch, scale: Tensor) -> tuple[torch.cuda.CUDAGraph, PackedBatch, Tensor, Tensor]:
        graph = torch.cuda.CUDAGraph()  # empties the cache first: the recording's own memory holds it all again
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            loss = self.backward(batch, scale)
        return graph, batch, scale, loss
