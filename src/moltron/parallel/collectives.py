"""Who we are among the processes, and the few collectives that the rest of the house uses.

torchrun's environment makes a job of several ranks; without it a process is a world of its own, in which every call
here works too. Nothing outside parallel/ and checkpoint/ touches torch.distributed.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DEVICES = ("auto", "cpu", "cuda")
_sharing = 1  # neighbouring ranks that work on one pack
_stages = 1  # ranks of a pipeline, far from each other, that do, too


def find_device(device: str | torch.device) -> torch.device:
    """device: auto (CUDA if there is one) | cpu | cuda | cuda:1 … Raises ValueError where there is no such device."""
    name, count = str(device), torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device={name} is unknown; there are: {', '.join(DEVICES)}")
    if name != "cpu" and int(name[5:] or 0) >= count:
        raise ValueError(
            f"device={name}, but torch sees {count} CUDA devices: install a CUDA build of torch or set device=cpu"
        )
    return torch.device(name)


def init(device: str = "auto", timeout_minutes: float = 30) -> torch.device:
    """Join (or found) the job; returns this rank's device. device: auto | cpu | cuda. Safe to call twice.

    A CPU backend (gloo) is always there, for small objects and asynchronous checkpoints; CUDA tensors go through NCCL.
    """
    local = find_device(device)
    if local.type == "cuda":
        local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo"
        timeout = timedelta(minutes=timeout_minutes)
        store, rank, world = dist.HashStore(), 0, 1
        if is_launched():
            shared, rank, world = next(dist.rendezvous("env://", timeout=timeout))
            store = _own_part(shared)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return local


def is_launched() -> bool:
    """Whether a launcher made this process one rank of a job."""
    return "WORLD_SIZE" in os.environ


def _own_part(store: dist.Store) -> dist.Store:
    """Of a store that torchrun keeps over restarts, what no other life uses: else one finds the dead one's addresses.

    Each node counts restarts for itself, so several nodes cannot name a life; without sharing each life has a store.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    if os.environ["GROUP_WORLD_SIZE"] != "1" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise ValueError("several nodes with --max-restarts: start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    return dist.PrefixStore(f"life {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def share_packs(ranks: int, stages: int = 1) -> None:
    """From now on, so many neighbouring ranks (those of context and tensor parallelism) work on one pack together.

    stages: ranks of a pipeline, the outermost axis, which have the same packs as well.
    """
    global _sharing, _stages
    _sharing, _stages = ranks, stages


def data_rank() -> int:
    """Which part of the data this rank works on, of `data_world_size()`."""
    return rank() // _sharing % data_world_size()


def data_world_size() -> int:
    return world_size() // (_sharing * _stages)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum over all parts of the data, in place; returns the tensor, floating point. Does not wait for the device.

    Of ranks that share a pack one counts, but a flag that only one of them has raised is not lost.
    """
    if world_size() > 1:
        dist.all_reduce(tensor)
        if _sharing * _stages > 1:
            tensor /= _sharing * _stages
    return tensor


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Maximum over all ranks, in place; returns the tensor."""
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_object(value: Any) -> Any:
    """Rank 0's value on every rank. For small plain values between the ranks of one job only."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    if world_size() > 1:
        dist.monitored_barrier() if dist.get_backend() == "gloo" else dist.barrier()


def shutdown(failed: bool = False) -> None:
    """Leave the job. failed: at once; NCCL would wait for ranks that wait for this one, and its error go unread."""
    share_packs(1)
    if dist.is_initialized() and not (failed and world_size() > 1 and torch.cuda.is_initialized()):
        dist.destroy_process_group()
