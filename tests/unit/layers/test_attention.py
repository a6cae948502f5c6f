"""attend(): equal to softmax over each sequence by itself, in values and gradients; bit-equal with any neighbours."""

import pytest
import torch

from moltron.layers.attention import Layout, attend


def layout_of(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    return Layout(cu, positions, max(lengths), tuple(lengths))


def reference(q, k, v, lengths):
    """Softmax written out, one sequence after the other, in float64."""
    outs = []
    for q1, k1, v1 in zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qnh,knh->nqk", q1, k1) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v1))
    return torch.cat(outs)


@pytest.mark.parametrize("lengths", [[5], [1, 2, 3], [7, 7, 7, 2, 7], [64, 1, 33]])
def test_equals_softmax_in_values_and_gradients(lengths):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 4, 16, generator=generator, requires_grad=True) for _ in range(3))
    weight = torch.randn(sum(lengths), 4, 16, generator=generator)
    out = attend(q, k, v, layout_of(lengths))
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    expected = reference(q, k, v, lengths)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_strided_views_of_one_projection():
    qkv = torch.randn(12, 4, 3, 8)
    q, k, v = qkv.unbind(-2)
    torch.testing.assert_close(
        attend(q, k, v, layout_of([5, 7])).double(), reference(q, k, v, [5, 7]), rtol=1e-5, atol=1e-6
    )


def test_bit_equal_whatever_the_neighbours():
    lengths = [40, 40, 17, 40, 100]
    q, k, v = (torch.randn(sum(lengths), 4, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    together = attend(q, k, v, layout_of(lengths)).split(lengths)
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    for got, (q1, k1, v1) in zip(together, pieces, strict=True):
        assert torch.equal(got, attend(q1, k1, v1, layout_of([len(q1)])))


def test_sequence_index():
    assert layout_of([2, 1, 3]).sequence_index().tolist() == [0, 0, 1, 2, 2, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("heads, width", [(20, 16), (20, 24), (20, 32), (20, 64), (4, 128)])
def test_cuda_kernels(dtype, tolerance, heads, width):
    lengths = [1, 17, 1022, 300, 45, 663]
    shape = (sum(lengths), heads, width)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    weight = torch.randn(shape, device="cuda")
    layout = layout_of(lengths).to("cuda")
    out = attend(q, k, v, layout)
    gradients = torch.autograd.grad((out * weight).sum(), (q, k, v))
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = reference(*inputs, lengths)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    for got, want in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert ((got - want).norm() / want.norm()).item() < tolerance
