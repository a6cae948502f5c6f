"""The mesh of ranks: which axes there are, and how many ranks each has.

    parallel.dp_replicate=2, 8 processes ──mesh_shape──> 2 × 4 ──build_mesh──> DeviceMesh(dp_replicate, dp_shard)

Neighbouring ranks (of one host) are next to each other on the last axis, which talks most.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moltron.config.schema import ParallelConfig

AXES = ("dp_replicate", "dp_shard")


def mesh_shape(config: ParallelConfig, world: int) -> tuple[int, int]:
    """Ranks on each of AXES. Raises ValueError with the fix where their product cannot be `world`."""
    replicate, shard = config.dp_replicate, config.dp_shard
    if replicate < 1 or (shard is not None and shard < 1):
        raise ValueError(f"parallel.dp_replicate={replicate} and parallel.dp_shard={shard} must be at least 1")
    found = world // replicate if shard is None else shard
    if replicate * found != world:
        sizes = f"dp_replicate={replicate}" + ("" if shard is None else f" × dp_shard={shard}")
        raise ValueError(
            f"parallel.{sizes} does not make the {world} processes of this run: leave dp_shard out and choose a "
            f"dp_replicate that divides {world}"
        )
    return replicate, found


def build_mesh(config: ParallelConfig, world: int, device_type: str) -> DeviceMesh:
    """With one copy of the weights, one axis: FSDP2 shards on it. With several, two: FSDP2's hybrid sharding."""
    shape = mesh_shape(config, world)
    if shape[0] == 1:
        return init_device_mesh(device_type, shape[1:], mesh_dim_names=AXES[1:])
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES)
