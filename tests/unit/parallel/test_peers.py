"""Gathers and reductions by copies between GPUs are NCCL's: the first to the bit, the second but for the order."""

import pytest
import torch
import torch.distributed as dist

from moltron.parallel import collectives
from moltron.parallel.peers import PeerAllGather, PeerReduceScatter, _Shared, reachable

N = 100_003  # an odd number of a shard's numbers


def on_rank():
    device = collectives.init("cuda")
    group, rank, world = dist.group.WORLD, collectives.rank(), collectives.world_size()
    assert reachable(group, device)
    gather = PeerAllGather(_Shared(group, device))
    reduces = [PeerReduceScatter(_Shared(group, device), dtype) for dtype in (torch.bfloat16, None)]
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
        expected = torch.empty(N, device=device)
        dist.reduce_scatter_tensor(expected, gradients.float(), op=dist.ReduceOp.AVG)
        for reduce in reduces:
            given = reduce.allocate((world * N,), dtype=torch.float32, device=device)
            assert given.dtype == (reduce.dtype or torch.float32)
            found = reduce.allocate((N,), dtype=torch.float32, device=device)
            reduce(found, given.copy_(gradients), group, dist.ReduceOp.AVG)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.cuda.synchronize()
    collectives.shutdown()


@pytest.mark.multi_gpu
def test_copies_between_gpus_are_nccls_collectives(ranks_of):
    with ranks_of(__file__):
        pass


if __name__ == "__main__":
    on_rank()
