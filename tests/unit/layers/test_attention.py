"""attend_qkv(): softmax over each sequence by itself, in values and gradients; bit-equal with any neighbours."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moltron.layers import attention
from moltron.layers.attention import RelativeBias, attend, attend_qkv
from moltron.layers.layout import Layout
from moltron.layers.positions import apply_rotary, rotary_table


def layout_of(lengths):
    return Layout.of(np.array(lengths))


def reference(qkv, lengths, rotary):
    """Rotation and softmax written out, one sequence after the other, in float64."""
    q, k, v = qkv.double().unbind(2)
    if rotary is not None:
        q, k = (apply_rotary(x, *(t.double() for t in rotary)) for x in (q, k))
    outs = []
    for q1, k1, v1 in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        scores = torch.einsum("qnh,knh->nqk", q1, k1) / q.shape[-1] ** 0.5
        outs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v1))
    return torch.cat(outs)


def compare(qkv, lengths, rotary, tolerance):
    """Output and gradient against the reference, in the norm of each."""
    qkv = qkv.requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    weight = torch.randn(sum(lengths), *qkv.shape[1::2], device=qkv.device)
    out = attend_qkv(qkv, layout_of(lengths).each(lambda x: x.to(qkv.device)), rotary)
    expected = reference(exact, lengths, rotary)
    gradient, expected_gradient = (
        torch.autograd.grad((y * weight).sum(), x)[0] for y, x in ((out, qkv), (expected, exact))
    )
    for got, want in ((out, expected), (gradient, expected_gradient)):
        assert ((got - want).norm() / want.norm()).item() < tolerance


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("lengths", [[5], [1, 2, 3], [7, 7, 7, 2, 7], [64, 1, 33]])
def test_equals_softmax_in_values_and_gradients(lengths, rotates):
    qkv = torch.randn(sum(lengths), 4, 3, 16, generator=torch.Generator().manual_seed(0))
    compare(qkv, lengths, rotary_table(layout_of(lengths).positions, 16, 1e4) if rotates else None, 1e-6)


def test_bit_equal_whatever_the_neighbours():
    lengths = [40, 40, 17, 40, 100]
    qkv = torch.randn(sum(lengths), 4, 3, 16, generator=torch.Generator().manual_seed(0))
    together = attend_qkv(qkv, layout_of(lengths), None).split(lengths)
    for got, alone in zip(together, qkv.split(lengths), strict=True):
        assert torch.equal(got, attend_qkv(alone, layout_of([len(alone)]), None))


# ------------------------------------------------------------------------------------------------ two streams: attend

Q_LENGTHS, K_LENGTHS = [7, 7, 1, 0, 3, 40], [7, 7, 12, 5, 0, 33]  # without queries: nothing; without keys: zeros
KINDS = {
    "plain": dict(),
    "scale": dict(scale=1.0),
    "causal": dict(causal=True),
    "bias": dict(reach=9),
    "causal, bias, scale": dict(causal=True, reach=9, scale=0.5),
}


def written_out(q, k, v, q_lengths, k_lengths, table, causal=False, scale=None):
    """One sequence, head and query after the other, in float64."""
    outs, reach = [], 0 if table is None else table.shape[1] // 2
    for q1, k1, v1 in zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
        for i in range(len(q1)):
            seen = slice(0, i + 1 if causal else None)
            scores = torch.einsum("nh,knh->nk", q1[i], k1[seen]) * (q.shape[-1] ** -0.5 if scale is None else scale)
            if table is not None:
                distances = [max(-reach, min(reach, j - i)) + reach for j in range(scores.shape[1])]
                scores = scores + table[:, distances]
            outs.append(torch.einsum("nk,knh->nh", scores.softmax(-1), v1[seen]))
    return torch.stack(outs)


@pytest.mark.parametrize("kind", KINDS)
def test_attend_equals_softmax_in_values_and_gradients(kind):
    options, causal = dict(KINDS[kind]), KINDS[kind].get("causal", False)
    generator = torch.Generator().manual_seed(0)
    k_lengths = Q_LENGTHS if causal else K_LENGTHS
    q, kv = torch.randn(58, 4, 8, generator=generator), torch.randn(sum(k_lengths), 4, 2, 8, generator=generator)
    reach = options.pop("reach", None)
    table = None if reach is None else torch.randn(4, 2 * reach + 1, generator=generator)
    inputs = [x.requires_grad_() for x in (q, kv, table) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out = attend(
        [q[:, :, None], kv], layout_of(Q_LENGTHS), layout_of(k_lengths),
        bias=None if table is None else RelativeBias(table), **options,
    )  # fmt: skip
    expected = written_out(
        exact[0], *exact[1].unbind(2), Q_LENGTHS, k_lengths, exact[2] if table is not None else None, **options
    )
    weight = torch.randn(out.shape, generator=generator)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), exact)
    for got, want in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert ((got - want).norm() / want.norm()).item() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_attend_bit_equal_whatever_the_neighbours(kind):
    options = dict(KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    lengths, k_lengths = (
        [20, 20, 17, 40, 20, 100],
        [20, 20, 17, 40, 20, 100] if "causal" in kind else [3, 3, 50, 9, 3, 80],
    )
    q, kv = (torch.randn(sum(n), 4, 2, 16, generator=generator) for n in (lengths, k_lengths))
    reach = options.pop("reach", None)
    bias = None if reach is None else RelativeBias(torch.randn(4, 2 * reach + 1, generator=generator))

    def run(q, kv, lengths, k_lengths):
        return attend([q[:, :, :1], kv], layout_of(lengths), layout_of(k_lengths), bias=bias, **options)

    together = run(q, kv, lengths, k_lengths).split(lengths)
    for got, q1, kv1 in zip(together, q.split(lengths), kv.split(k_lengths), strict=True):
        assert torch.equal(got, run(q1, kv1, [len(q1)], [len(kv1)]))


@pytest.mark.parametrize(
    "options, chosen",
    [
        (dict(), True),
        (dict(dtype=torch.float32), False),
        (dict(width=12), False),
        (dict(width=136), False),
        (dict(bias=True), True),
        (dict(bias=True, trained=True), False),  # the kernels' backward knows no bias
        (dict(trained=True), True),
    ],
)
def test_attend_chooses_the_kernels_on_cuda(on_cuda, monkeypatch, options, chosen):
    calls = []

    def attend_projections(projections, q_layout, k_layout, *, causal, bias_table, scale):
        calls.append((causal, bias_table is not None, scale))
        return torch.empty(12, 2, width, device="cuda", dtype=dtype)

    monkeypatch.setattr(attention, "attend_projections", attend_projections)
    monkeypatch.setattr(attention, "_attend_by_lengths", lambda q, *_: torch.empty_like(q))
    width, dtype = options.get("width", 16), options.get("dtype", torch.bfloat16)
    trained = options.get("trained", False)
    leaf = dict(device="cuda", dtype=dtype, requires_grad=trained and "bias" not in options)
    qkv = torch.empty(12, 2, 3, width, **leaf)
    bias = RelativeBias(torch.empty(2, 7, device="cuda", requires_grad=trained)) if "bias" in options else None
    out = attend([qkv], on_cuda, on_cuda, causal=True, bias=bias)
    assert out.shape == (12, 2, width) and out.dtype == dtype
    assert calls == ([(True, bias is not None, width**-0.5)] if chosen else [])


TRITON = "moltron.packed_attention.default"


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def on_cuda():
    """Tensors that say they are on a GPU, without one: what is chosen and traced can be seen on any machine."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layout = layout_of([5, 7])
        fake = {
            name: torch.empty(getattr(layout, name).shape, dtype=torch.int32, device="cuda")
            for name in ("cu_seqlens", "positions", "tiles")
        }
        yield layout.but(**fake)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width, chosen", [(8, TRITON), (24, TRITON), (128, TRITON), (136, None), (12, None)])
def test_kernel_chosen_on_cuda(on_cuda, dtype, width, chosen):
    pytest.importorskip("triton", reason="triton is not installed")
    qkv, angles = (
        torch.empty(12, 2, 3, width, device="cuda", dtype=dtype),
        torch.empty(12, 1, width // 2, device="cuda"),
    )
    with Calls() as calls:
        out = attend_qkv(qkv, on_cuda, (angles, angles))
    assert out.shape == (12, 2, width) and out.dtype == dtype
    assert (TRITON in calls.names) == (chosen is TRITON)


def test_without_triton_sdpa(on_cuda, monkeypatch):
    monkeypatch.setattr(attention, "packed_attention", None)
    monkeypatch.setattr(attention, "attend_projections", None)
    with Calls() as calls:
        out = attend_qkv(torch.empty(12, 2, 3, 16, device="cuda", dtype=torch.bfloat16), on_cuda, None)
    assert TRITON not in calls.names and out.shape == (12, 2, 16)


def test_compiled_into_one_graph_with_the_triton_op(on_cuda):
    pytest.importorskip("triton", reason="triton is not installed")
    targets = []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    qkv, angles = torch.empty(12, 2, 3, 16, device="cuda", dtype=torch.bfloat16), torch.empty(12, 1, 8, device="cuda")
    compiled = torch.compile(lambda x: attend_qkv(x + 1, on_cuda, (angles, angles)), fullgraph=True, backend=backend)
    assert compiled(qkv).shape == (12, 2, 16)
    assert targets.count("moltron.packed_attention") == 1 and not any("cat" in target for target in targets)


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CASES = [(dtype, width) for width in (16, 24, 32, 64, 128) for dtype in TOLERANCE] + [(torch.bfloat16, 160)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, width", CASES)
def test_cuda_kernels(dtype, width):
    lengths = [1, 17, 1022, 300, 45, 663]
    qkv = torch.randn(sum(lengths), 5, 3, width, device="cuda", dtype=dtype)
    compare(qkv, lengths, rotary_table(layout_of(lengths).positions.cuda(), width, 1e4), TOLERANCE[dtype])
