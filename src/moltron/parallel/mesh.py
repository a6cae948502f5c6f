"""The mesh of ranks: which axes there are, and how many ranks each has.

    parallel.tp=2, 8 processes ──mesh_shape──> 1 × 4 × 2 ──build_mesh──> DeviceMesh(dp_shard, tp)

Neighbouring ranks (of one host) are next to each other on the last axis, which talks most.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moltron.config.schema import ParallelConfig

AXES = ("dp_replicate", "dp_shard", "tp")


def mesh_shape(config: ParallelConfig, world: int) -> tuple[int, int, int]:
    """Ranks on each of AXES. Raises ValueError with the fix where their product cannot be `world`."""
    replicate, shard, tp = config.dp_replicate, config.dp_shard, config.tp
    for axis, ranks in zip(AXES, (replicate, shard, tp), strict=True):
        if ranks is not None and ranks < 1:
            raise ValueError(f"parallel.{axis}={ranks} must be at least 1")
    found = world // (replicate * tp) if shard is None else shard
    if replicate * found * tp != world:
        given = f"dp_replicate={replicate} × " + ("" if shard is None else f"dp_shard={shard} × ") + f"tp={tp}"
        raise ValueError(
            f"parallel: {given} does not make the {world} processes of this run: leave dp_shard out and let "
            f"dp_replicate · tp divide {world}"
        )
    return replicate, found, tp


def build_mesh(config: ParallelConfig, world: int, device_type: str) -> DeviceMesh:
    """dp_shard, and the other axes where they have more than one rank."""
    axes = [(n, axis) for n, axis in zip(mesh_shape(config, world), AXES) if n > 1 or axis == "dp_shard"]
    sizes, names = zip(*axes)
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes on which weights are sharded and gradients averaged: two of them are FSDP2's hybrid sharding."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name != "tp")
    return mesh[names]
