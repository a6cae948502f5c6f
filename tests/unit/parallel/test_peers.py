"""Gathers and reductions by copies between GPUs are the library's: the first to the bit, the second but for the order.

Without GPUs, two gloo ranks map each other's memory through files: what is copied where and which buffer is written is
the same; streams are not there.
"""

import contextlib
import copy
import os
import sys
import types
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moltron.parallel import collectives, peers
from moltron.parallel.apply import set_gradient_sync

N = 100_003  # an odd number of a shard's numbers


class Files:
    """torch's symmetric memory, of processes of one host on a CPU."""

    def __init__(self, folder):
        self.folder, self.known = folder, {}

    def of(self, rank, index, size, dtype):
        return torch.from_file(f"{self.folder}/{rank}-{index}", shared=True, size=size, dtype=dtype)

    def empty(self, size, *, dtype=torch.float32, device=None):
        tensor = self.of(dist.get_rank(), len(self.known), size, dtype)
        self.known[tensor.data_ptr()] = len(self.known)
        return tensor

    def rendezvous(self, tensor, group):
        index, (size,) = self.known[tensor.data_ptr()], tensor.shape
        dist.barrier(group)

        def get_buffer(rank, shape, dtype, offset=0):
            return self.of(dist.get_global_rank(group, rank), index, size, dtype)[offset : offset + shape[0]]

        return types.SimpleNamespace(barrier=lambda: dist.barrier(group), get_buffer=get_buffer)


class Stream:
    def __init__(self, *arguments, **settings):
        pass

    def wait_stream(self, other):
        pass


def collectives_are_equal(device, group):
    rank, world = group.rank(), group.size()
    gather = peers.PeerAllGather(peers._Shared(group, device))
    reduces = [peers.PeerReduceScatter(peers._Shared(group, device), dtype) for dtype in (torch.bfloat16, None)]
    torch.manual_seed(rank)
    for _ in range(5):  # buffers take turns
        own = torch.randn(N, device=device, dtype=torch.bfloat16)
        expected = torch.empty(world * N, device=device, dtype=torch.bfloat16)
        dist.all_gather_into_tensor(expected, own)
        found = gather.allocate((world * N,), dtype=torch.bfloat16, device=device)
        part = found[rank * N : (rank + 1) * N]
        part.copy_(own)
        gather(found, part, group)
        assert torch.equal(found, expected)
        gradients = torch.randn(world * N, device=device).bfloat16()
        whole = gradients.float()
        dist.all_reduce(whole)
        expected = whole[rank * N : (rank + 1) * N] / world
        for reduce in reduces:
            given = reduce.allocate((world * N,), dtype=torch.float32, device=device)
            assert given.dtype == (reduce.dtype or torch.float32)
            found = reduce.allocate((N,), dtype=torch.float32, device=device)
            reduce(found, given.copy_(gradients), group, dist.ReduceOp.AVG)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def training_is_equal(device, group, reshard):
    """Two steps of three packs; reshard: each pack's gradients are reduced, else their sum."""
    rank, mesh = group.rank(), dist.device_mesh.init_device_mesh(device.type, (group.size(),))
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(13, 13, device=device) for _ in range(4)))
    packs, results = torch.randn(2, 3, group.size(), 7, 13, device=device), []
    for by_peers in (False, True):
        one = copy.deepcopy(model)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for module in (*one, one):
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        if by_peers:
            peers.use_peers([one], group, device, torch.bfloat16 if reshard else None)
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for step in packs:
            for i, pack in enumerate(step):
                set_gradient_sync(one, reshard or i == 2)
                one(pack[rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.full_tensor() for parameter in one.parameters()])
    for found, expected, begin in zip(*results, model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert not torch.equal(found, begin)


def on_rank(device, folder=None):
    device = collectives.init(device)
    group = dist.group.WORLD
    with contextlib.ExitStack() as fakes:
        if device.type == "cpu":
            fakes.enter_context(patch.object(peers, "symmetric", Files(folder)))
            fakes.enter_context(patch.object(peers, "reachable", lambda group, device: True))
            for name, fake in dict(Stream=Stream, current_stream=Stream, stream=contextlib.nullcontext).items():
                fakes.enter_context(patch.object(torch.cuda, name, fake))
        assert peers.reachable(group, device)
        collectives_are_equal(device, group)
        for reshard in (True, False):
            training_is_equal(device, group, reshard)
    if device.type == "cuda":
        torch.cuda.synchronize()
    collectives.shutdown()


def test_copies_are_the_collectives(ranks_of, tmp_path):
    with ranks_of(__file__, "cpu", str(tmp_path)):
        pass
    assert len(os.listdir(tmp_path)) > 8  # they were used


@pytest.mark.multi_gpu
def test_copies_between_gpus_are_nccls_collectives(ranks_of):
    with ranks_of(__file__, "cuda"):
        pass


if __name__ == "__main__":
    on_rank(*sys.argv[1:])
