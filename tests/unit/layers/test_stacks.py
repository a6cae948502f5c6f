"""T5's buckets of relative positions, as `transformers` counts them, as a table by distance."""

import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from moltron.layers.stacks import EncoderBlock, Stack, Style, bucket_columns


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("buckets, reach", [(32, 128), (12, 50), (4, 3), (33, 128), (64, 1000), (32, 33)])
def test_buckets_are_those_of_transformers(buckets, reach, causal):
    distances = torch.arange(-2000, 1 if causal else 2001)
    expected = T5Attention._relative_position_bucket(distances, not causal, buckets, reach)
    flat = [bucket for bucket, count in bucket_columns(buckets, reach, causal) for _ in range(count)]
    assert len(flat) == 2 * reach + 1
    assert torch.equal(torch.tensor(flat)[distances.clamp(-reach, reach) + reach], expected)


@pytest.mark.parametrize("buckets, reach", [(2, 128), (32, 16)])
def test_buckets_that_mean_nothing_are_refused(buckets, reach):
    with pytest.raises(ValueError, match="buckets of relative positions"):
        bucket_columns(buckets, reach, causal=False)


def test_the_table_is_in_fp32_and_reads_every_bucket():
    style = Style(16, 2, 8, 32, 1e-6, buckets=8, reach=20)
    stack = Stack(EncoderBlock, 1, style).to(torch.bfloat16)
    bias = stack.bias()
    assert bias.table.dtype == torch.float32 and bias.table.shape == (2, 41)
    weight = stack.relative_bias.weight.float()
    assert torch.equal(bias.table[:, 20], weight[0]) and torch.equal(bias.table[:, 0], weight[3])
    bias.table.sum().backward()
    reads = stack.relative_bias.weight.grad[:, 0]
    assert reads.sum() == 41 and reads.nonzero().flatten().tolist() == [0, 1, 2, 3, 5, 6, 7]  # 4: ahead by nothing
    assert Stack(EncoderBlock, 1, Style(16, 2, 8, 32, 1e-6)).bias() is None
