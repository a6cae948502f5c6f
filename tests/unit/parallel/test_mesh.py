"""Which axes a job gets, and what is said where they do not fit."""

import pytest

from moltron.config.schema import ParallelConfig
from moltron.parallel.mesh import mesh_shape


@pytest.mark.parametrize(
    "replicate, shard, world, shape",
    [(1, None, 8, (1, 8)), (2, None, 8, (2, 4)), (8, 1, 8, (8, 1)), (1, None, 1, (1, 1))],
)
def test_what_is_left_is_sharded(replicate, shard, world, shape):
    assert mesh_shape(ParallelConfig(dp_replicate=replicate, dp_shard=shard), world) == (1, *shape, 1, 1)
    config = ParallelConfig(pp=2, dp_replicate=replicate, dp_shard=shard, cp=5, tp=3)
    assert mesh_shape(config, 30 * world) == (2, *shape, 5, 3)


@pytest.mark.parametrize(
    "replicate, shard, said",
    [
        (3, None, "dp_replicate=3 does not make the 8 processes"),
        (2, 2, "dp_replicate=2 × dp_shard=2 does not make the 8 processes"),
        (0, None, "must be at least 1"),
        (1, 0, "must be at least 1"),
    ],
)
def test_what_does_not_fit_is_said_with_the_fix(replicate, shard, said):
    with pytest.raises(ValueError, match=said):
        mesh_shape(ParallelConfig(dp_replicate=replicate, dp_shard=shard), 8)
