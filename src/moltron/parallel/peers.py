"""FSDP2's gathers and reductions over NVLink's copy engines: GPUs of one host read each other's memory.

    gather   own shard ──> a buffer that peers see ──barrier──> each copies the others' shards
    reduce   own gradients, in their dtype ──> such a buffer ──barrier──> each copies the others' for its shard, adds up

NCCL's kernels take multiprocessors from the matrix products that run beside them; copies take none. Gradients travel in
the dtype that the backward wrote, half of fp32, and are added up in fp32 as NCCL would: the same but for the order. Two
buffers take turns, so one barrier a collective is enough: who has passed the next one has read the last.

n numbers of a shard, R ranks
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moltron.common.logging import get_logger

log = get_logger(__name__)


class _Shared:
    """Buffers that all ranks of a group see, two for each size, and a stream of their own."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.rank, self.world = group, group.rank(), group.size()
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.buffers: dict[tuple[int, torch.dtype], list[tuple[Tensor, Any]]] = {}
        self.turns: dict[tuple[int, torch.dtype], int] = {}

    def next(self, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Any]:
        """A buffer and its handle; the same call, in the same order, on every rank."""
        key = size, dtype
        if key not in self.buffers:
            made = [symmetric.empty(size, dtype=dtype, device=device) for _ in range(2)]
            self.buffers[key] = [(buffer, symmetric.rendezvous(buffer, self.group)) for buffer in made]
        turn = self.turns[key] = self.turns.get(key, 1) ^ 1
        return self.buffers[key][turn]

    def others(self) -> list[int]:
        """The other ranks, in an order in which no two ranks begin with the same one."""
        return [(self.rank + step) % self.world for step in range(1, self.world)]


class PeerAllGather:
    """For FSDPModule.set_custom_all_gather."""

    def __init__(self, shared: _Shared):
        self.shared = shared

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """output: (R · n,); input: this rank's part of it."""
        shared, n, current = self.shared, len(input_tensor), torch.cuda.current_stream()
        own, handle = shared.next(n, input_tensor.dtype, input_tensor.device)
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream):
            own.copy_(input_tensor)
            handle.barrier()
            for peer in shared.others():
                output_tensor.narrow(0, peer * n, n).copy_(handle.get_buffer(peer, (n,), own.dtype))
        current.wait_stream(shared.stream)


class PeerReduceScatter:
    """For FSDPModule.set_custom_reduce_scatter; averages. dtype: what travels; None: what gradients are added up in."""

    def __init__(self, shared: _Shared, dtype: torch.dtype | None):
        self.shared, self.dtype = shared, dtype
        self.handle: Any = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """FSDP2 asks for what goes in, then for what comes out."""
        if self.handle is None:
            buffer, self.handle = self.shared.next(size[0], self.dtype or dtype, device)
            return buffer
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """output: (n,); input: (R · n,), what `allocate` gave."""
        assert op == dist.ReduceOp.AVG, op
        shared, n, current = self.shared, len(output_tensor), torch.cuda.current_stream()
        handle, self.handle = self.handle, None
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream):
            parts = torch.empty(shared.world, n, dtype=input_tensor.dtype, device=output_tensor.device)
            handle.barrier()
            for peer in (*shared.others(), shared.rank):
                parts[peer].copy_(handle.get_buffer(peer, (n,), parts.dtype, shared.rank * n))
            torch.mean(parts, 0, dtype=output_tensor.dtype, out=output_tensor)
        current.wait_stream(shared.stream)


def reachable(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether a group's GPUs are on one host and can map each other's memory; the same on each rank."""
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, (socket.gethostname(), device.index), group=group)
    hosts, indices = ({place[i] for place in places} for i in (0, 1))
    if len(hosts) > 1 or len(indices) < len(places):  # on several hosts, or each rank sees its own GPU only
        return False
    is_mapped = all(torch.cuda.can_device_access_peer(device, i) for i in indices - {device.index})
    if is_mapped:
        try:
            symmetric.rendezvous(symmetric.empty(1024, device=device), group)
        except RuntimeError as error:  # e.g. a container that may not share memory
            log.info("GPUs cannot map each other's memory, so NCCL carries weights and gradients: %s", error)
            is_mapped = False
    agreed: list[Any] = [None] * group.size()
    dist.all_gather_object(agreed, is_mapped, group=group)
    return all(agreed)


def use_peers(
    models: Sequence[nn.Module], group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype | None
) -> None:
    """models: FSDP2's, sharded over `group`; where that is not of one host, or of one rank, nothing changes.

    dtype: that of the gradients of one pack, where each is reduced at once; None where they are added up before, in
    the dtype of the reduction.
    """
    if group.size() == 1 or not reachable(group, device):
        return
    gather, reduce = PeerAllGather(_Shared(group, device)), PeerReduceScatter(_Shared(group, device), dtype)
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(gather)  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(reduce)  # type: ignore[arg-type]
