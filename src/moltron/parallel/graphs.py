"""What is done with a pack, as one CUDA graph: a launch instead of hundreds, so that no GPU waits for Python.

    1st pack of a shape ──as usual: compiles──> results    2nd ──recorded──> graph    2nd, 3rd … ──replayed──> results

Every pack is computed once, whichever way. In training, gradients are added to the parameters' own `grad`, which must
stay where they are from the first pack on. Knows nothing of models, losses and optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moltron.models.batch import PackedBatch

OfPack = Callable[[PackedBatch, Tensor], tuple[Tensor, ...]]


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: tuple[Tensor, ...]


class Graphed:
    """As `function(batch, tensor) → tensors`, all on one CUDA device; the inputs may still be on their way there.

    The function reads of a batch nothing but its tensors. What it returns is the caller's: the next pack does not
    write there.
    """

    def __init__(self, function: OfPack, device: torch.device):
        self.function, self.device = function, device
        self.recordings: dict[Any, _Recording | None] = {}
        self.stream = torch.cuda.Stream(device)  # autograd wants one stream for all that is ever recorded
        self.pool = torch.cuda.graph_pool_handle()  # of all recordings: only one runs at a time

    def __call__(self, batch: PackedBatch, tensor: Tensor) -> tuple[Tensor, ...]:
        inputs = [*batch.tensors(), tensor]
        shape = tuple(x.shape for x in inputs)
        if shape not in self.recordings:
            self.recordings[shape] = None
            return self._now(batch.to(self.device, non_blocking=True), tensor.to(self.device, non_blocking=True))
        recording = self.recordings[shape]
        if recording is None:
            recording = self.recordings[shape] = self._record(batch.to(self.device), tensor.to(self.device, copy=True))
        for old, new in zip(recording.inputs, inputs, strict=True):
            old.copy_(new, non_blocking=True)
        recording.graph.replay()
        return tuple(x.clone() for x in recording.outputs)

    def close(self) -> None:
        """Drop the recordings: NCCL does not leave a communicator that one of them has collectives of."""
        self.recordings.clear()

    def _now(self, batch: PackedBatch, tensor: Tensor) -> tuple[Tensor, ...]:
        for layout in (batch.layout, batch.decoder_layout):
            for x in () if layout is None else (layout.cu_seqlens, layout.tiles):
                torch._dynamo.maybe_mark_dynamic(x, 0)  # one compilation, and its bits, for any number of sequences
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = self.function(batch, tensor)
        here.wait_stream(self.stream)
        for output in outputs:
            output.record_stream(here)
        return outputs

    def _record(self, batch: PackedBatch, tensor: Tensor) -> _Recording:
        graph = torch.cuda.CUDAGraph()  # empties the cache first: the recording's own memory holds it all again
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            outputs = self.function(batch, tensor)
        return _Recording(graph, [*batch.tensors(), tensor], outputs)
