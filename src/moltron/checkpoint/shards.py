"""The files of a training checkpoint: safetensors shards, one a rank, and their hashes. Knows no steps, no folders.

    tensors ──local_chunk──> this rank's piece of each ──write_shard──> shard-00001-of-00004.safetensors, size, sha256
    shards ──read_shards──> tensors of any layout, in place

The shards are the format of torch.distributed.checkpoint's HuggingFaceStorageWriter(save_distributed=True), and its
HuggingFaceStorageReader reads them. That writer makes two more copies of the state and holds the interpreter lock while
it serialises; safetensors' own `save_file` (from 0.8 on) copies nothing and writes outside the lock.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moltron.common.manifest import fsync, sha256_file

Chunk = tuple[Tensor, tuple[int, ...]]  # a piece of a tensor, where it begins in the whole


def local_chunk(tensor: Tensor, owner: int, rank: int) -> Chunk | None:
    """What this rank writes of `tensor`: None where another rank has the same piece, or where the piece is empty.

    A DTensor is written by the first rank of each replica, a plain tensor (the same on all ranks) by `owner`.
    """
    piece, offset = tensor.detach(), (0,) * tensor.dim()
    if isinstance(piece, DTensor):
        mesh, placements = piece.device_mesh, piece.placements
        if any(p.is_partial() for p in placements):
            raise ValueError(f"a checkpoint cannot hold a tensor that is not reduced yet: {placements}")
        coordinate = mesh.get_coordinate()
        if coordinate is None or any(isinstance(p, Replicate) and c for p, c in zip(placements, coordinate)):
            return None
        _, offset = compute_local_shape_and_global_offset(piece.shape, mesh, placements)
        piece = piece.to_local()
    elif owner != rank:
        return None
    if not piece.numel():
        return None
    return (piece, tuple(offset)) if piece.dim() else (piece.view(1), (0,))  # 0-dim tensors are stored as (1,)


def write_shard(path: Path, chunks: Mapping[str, Chunk]) -> dict:
    """Write contiguous CPU tensors, flush them to the disk; returns {"size", "sha256"}."""
    offsets = {name: {"saved_offsets": list(offset)} for name, (_, offset) in chunks.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    save_file({name: piece for name, (piece, _) in chunks.items()}, path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # save_file's files are the owner's alone: as the umask has it
    fsync(path)
    return {"size": path.stat().st_size, "sha256": sha256_file(path)}


def read_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill `tensors` in place, plain or DTensor, each rank reading the parts it holds. All ranks of `group` call it."""
    state = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            whole = tensor.to_local() if isinstance(tensor, DTensor) and not tensor.dim() else tensor
            state[name] = whole.detach() if whole.dim() else whole.detach().view(1)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")
        load(state, storage_reader=reader, planner=planner, process_group=group, no_dist=group is None)
