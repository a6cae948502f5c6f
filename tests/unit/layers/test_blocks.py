"""The feed-forward layer whose first product and activation are one kernel is the one whose are two."""

import pytest
import torch

from moltron.layers.blocks import FeedForward


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("activation, bias", [("relu", True), ("relu", False), ("tanh", True), ("tanh", False)])
@torch.no_grad()
def test_fused_is_not_fused(activation, bias, device):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer, x_TD = FeedForward(64, 256, activation, bias).to(device, dtype), torch.randn(96, 64, device=device).to(dtype)
    expected = layer.double()(x_TD.double())
    layer.to(dtype).fused = True
    # on a CPU torch's own GELU of this kind is the exact one; the product asks for it on a GPU only
    tolerance = 2e-2 if device == "cuda" else 1e-3 if activation == "tanh" else 1e-6
    torch.testing.assert_close(layer(x_TD).double(), expected, rtol=tolerance, atol=tolerance)


def test_an_exact_gelu_is_left_alone():
    layer, x_TD = FeedForward(64, 256, "none"), torch.randn(9, 64)
    expected = layer(x_TD)
    layer.fused = True
    assert torch.equal(layer(x_TD), expected)
