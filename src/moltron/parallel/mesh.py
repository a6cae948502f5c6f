"""The mesh of ranks: which axes there are, and how many ranks each has.

    parallel.tp=2, 8 processes ──mesh_shape──> 1 × 4 × 2 ──build_mesh──> DeviceMesh(dp_shard, tp)

Neighbouring ranks (of one host) are next to each other on the last axis, which talks most.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moltron.config.schema import ParallelConfig

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")


def mesh_shape(config: ParallelConfig, world: int) -> tuple[int, int, int, int, int]:
    """Ranks on each of AXES. Raises ValueError with the fix where their product cannot be `world`."""
    given = {axis: getattr(config, axis) for axis in AXES}
    for axis, ranks in given.items():
        if ranks is not None and ranks < 1:
            raise ValueError(f"parallel.{axis}={ranks} must be at least 1")
    others = config.pp * config.dp_replicate * config.cp * config.tp
    shard = world // others if config.dp_shard is None else config.dp_shard
    if others * shard != world:
        asked = " × ".join(f"{axis}={ranks}" for axis, ranks in given.items() if ranks not in (None, 1))
        raise ValueError(
            f"parallel: {asked} does not make the {world} processes of this run: leave dp_shard out and let the "
            f"product of the others divide {world}"
        )
    return config.pp, config.dp_replicate, shard, config.cp, config.tp


def is_sharded(config: ParallelConfig, world: int) -> bool:
    """Whether FSDP2 has the weights: neither on one rank, nor where ranks of tensor parallelism are the only ones."""
    return config.cpu_offload or any(ranks > 1 for ranks in mesh_shape(config, world)[:-1])


def build_mesh(config: ParallelConfig, world: int, device_type: str) -> DeviceMesh:
    """dp_shard, and the other axes where they have more than one rank."""
    axes = [(n, axis) for n, axis in zip(mesh_shape(config, world), AXES) if n > 1 or axis == "dp_shard"]
    sizes, names = zip(*axes)
    return init_device_mesh(device_type, sizes, mesh_dim_names=names)


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The axes on which weights are sharded and gradients averaged: two of them are FSDP2's hybrid sharding.

    Ranks of context parallelism shard weights as well.
    """
    names = mesh.mesh_dim_names or ()
    shard = mesh["dp_shard", "cp"]._flatten("dp_shard_cp") if "cp" in names else mesh["dp_shard"]
    if "dp_replicate" not in names:
        return shard
    return mesh["dp_replicate", "dp_shard_cp" if "cp" in names else "dp_shard"]
