"""The Triton attention op: every kernel in Triton's interpreter on the CPU, the compiled ones under the marker `gpu`.

The interpreter must be chosen before Triton is first imported, so those cases run in a process of their own, which this
file is too: `TRITON_INTERPRET=1 python test_triton_attention.py` prints what it found as JSON.

Kinds of attention: bidirectional with rotation from one projection (`packed_attention`); causal, cross and biased
(`attend_projections`), all against float64.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: CUDA builds of torch and the extra dev bring it")

from moltron.layers.layout import Layout
from moltron.layers.positions import apply_rotary, rotary_table
from moltron.layers.triton_attention import attend_projections, packed_attention

INTERPRETED = {  # head width, lengths, rotary
    "lengths around the tile's": (16, [1, 17, 64, 70, 130], True),
    "no rotation": (16, [70, 5], False),
    "width padded": (24, [64, 3, 65], True),
    "empty sequences": (32, [0, 20, 0], True),
    "one token": (8, [1], True),
}


@dataclass(frozen=True)
class Kind:
    """One case of `attend_projections`. parts: those of each projection; None: three views of one."""

    head_dim: int
    q_lengths: list[int]
    k_lengths: list[int] | None = None  # None: self-attention
    parts: tuple[int, ...] | None = (3,)
    causal: bool = False
    radius: int | None = None  # of the bias; such a case has no gradient
    scale: float = 0.3
    num_heads: int = 1


KINDS = {
    "bidirectional": Kind(16, [64, 5, 70]),
    "causal, lengths around the tile's": Kind(16, [1, 64, 65, 130, 0], causal=True),
    "causal, views of one projection": Kind(24, [66, 0, 3], parts=None, causal=True, num_heads=2),
    "causal, width 128": Kind(128, [66], parts=(2, 1), causal=True),
    "cross": Kind(16, [1, 66, 64, 3, 0, 5], [130, 2, 64, 0, 66, 1], (1, 2), num_heads=2),
    "cross, views of one projection": Kind(24, [2, 66], [66, 2], None, num_heads=2),
    "cross, width 64": Kind(64, [5, 65], [70, 1], (1, 1, 1)),
    "cross, width 128": Kind(128, [3, 2], [66, 0], (1, 2)),
    "cross, no keys at all": Kind(8, [3, 1], [0, 0], (1, 2)),
    "cross, no queries at all": Kind(8, [0, 0], [3, 1], (1, 2)),
    "bias": Kind(16, [1, 66, 130], radius=5, scale=1.0, num_heads=2),
    "bias by one number": Kind(16, [70], radius=0),
    "causal bias": Kind(24, [66, 3], causal=True, radius=80, scale=1.0, num_heads=2),
    "cross bias": Kind(64, [3, 65], [70, 2], (1, 2), radius=20),
}
COMPANY = {"causal, lengths around the tile's": 2, "cross": 1, "bias": 1}  # the sequence that gets other neighbours


def reference(qkv_TN3H: Tensor, rotary, lengths: list[int], dout: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64, one sequence at a time."""
    x = qkv_TN3H.detach().double().requires_grad_()
    q, k, v = x.unbind(2)
    if rotary is not None:
        cos, sin = (t.double() for t in rotary)
        first, second = x[:, :, :2].chunk(2, dim=-1)
        cos, sin = cos[:, None, None], sin[:, None, None]
        q, k = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).unbind(2)
    outs = []
    for q_LNH, k_LNH, v_LNH in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        weights = (torch.einsum("qnh,knh->nqk", q_LNH, k_LNH) * q.shape[-1] ** -0.5).softmax(-1)
        outs.append(torch.einsum("nqk,knh->qnh", weights, v_LNH))
    out = torch.cat(outs)
    return out.detach(), torch.autograd.grad(out, x, dout.double())[0]


def inputs(lengths: list[int], num_heads: int, head_dim: int, dtype, device: str = "cpu", seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), num_heads, 3, head_dim, generator=generator)
    dout = torch.randn(sum(lengths), num_heads, head_dim, generator=generator)
    return qkv.to(device, dtype), dout.to(device, dtype)


def relative(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def errors(out: Tensor, grad: Tensor, truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    names = ("dq", "dk", "dv")
    # dq and dk of a sequence of one token are zero, so the three are measured against the norm of all
    return {"out": relative(out, truth[0])} | {
        name: ((grad[:, :, i].double() - truth[1][:, :, i]).norm() / truth[1].norm()).item()
        for i, name in enumerate(names)
    }


def layout_of(lengths: list[int], device: str = "cpu") -> Layout:
    return Layout.of(np.array(lengths)).each(lambda x: x.to(device))


@dataclass
class Inputs:
    """Of one `Kind`: projections, table of the bias, gradient of the output."""

    projections: list[Tensor]
    table: Tensor | None
    dout: Tensor


def draw(kind: Kind, dtype, device: str = "cpu") -> Inputs:
    generator, num_heads = torch.Generator().manual_seed(0), kind.num_heads
    q, k = sum(kind.q_lengths), sum(kind.q_lengths if kind.k_lengths is None else kind.k_lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    parts = kind.parts or (3,)  # views of one projection: as long as the longer stream, `parts_of` cuts them
    tokens = [max(q, k)] if kind.parts is None else [q, k, k]
    projections = [normal(n, num_heads, count, kind.head_dim) for n, count in zip(tokens, parts)]
    table = None if kind.radius is None else normal(num_heads, 2 * kind.radius + 1).to(device)
    dout = normal(q, num_heads, kind.head_dim).to(device, dtype)
    return Inputs([x.to(device, dtype) for x in projections], table, dout)


def parts_of(kind: Kind, projections: list[Tensor]) -> list[Tensor]:
    """q, k, v as views."""
    q, k = sum(kind.q_lengths), sum(kind.q_lengths if kind.k_lengths is None else kind.k_lengths)
    parts = [part for x in projections for part in x.unbind(2)]
    return [part[:n] for part, n in zip(parts, (q, k, k), strict=True)]


def layouts_of(kind: Kind, device: str = "cpu") -> tuple[Layout, Layout]:
    layout = layout_of(kind.q_lengths, device)
    return layout, layout if kind.k_lengths is None else layout_of(kind.k_lengths, device)


def attended(kind: Kind, inputs: Inputs) -> list[Tensor]:
    """Output and the gradients of the projections, none with a bias."""
    projections = [x.detach().requires_grad_(kind.radius is None) for x in inputs.projections]
    layouts = layouts_of(kind, str(inputs.dout.device))
    settings: dict[str, Any] = dict(causal=kind.causal, bias_table=inputs.table, scale=kind.scale)
    if kind.parts is None:
        q, k, v = parts_of(kind, projections)
        out = attend_projections([x[:, :, None] for x in (q, k, v)], *layouts, **settings)
    else:
        out = attend_projections(projections, *layouts, **settings)
    return [out.detach(), *(torch.autograd.grad(out, projections, inputs.dout) if kind.radius is None else ())]


def true_attended(kind: Kind, inputs: Inputs) -> list[Tensor]:
    """The same in float64: SDPA of one sequence at a time."""
    projections = [x.detach().double().requires_grad_() for x in inputs.projections]
    q, k, v = parts_of(kind, projections)
    k_lengths = kind.q_lengths if kind.k_lengths is None else kind.k_lengths
    outs = [q.sum() * 0 + q[:0]]  # so that there is a gradient where nothing has keys
    for q1, k1, v1 in zip(q.split(kind.q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True):
        if not len(q1) or not len(k1):
            outs.append(q1 * 0)
            continue
        away = torch.arange(len(k1))[None, :] - torch.arange(len(q1))[:, None]
        mask = torch.zeros(q.shape[1], len(q1), len(k1), dtype=torch.float64, device=q.device)
        if inputs.table is not None and kind.radius is not None:
            mask = mask + inputs.table.double()[:, away.clamp(-kind.radius, kind.radius) + kind.radius]
        if kind.causal:
            mask = mask.masked_fill((away > 0).to(q.device), -torch.inf)
        heads = [x.transpose(0, 1)[None] for x in (q1, k1, v1)]
        outs.append(F.scaled_dot_product_attention(*heads, attn_mask=mask[None], scale=kind.scale)[0].transpose(0, 1))
    out = torch.cat(outs)
    if kind.radius is not None:
        return [out.detach()]
    gradients = torch.autograd.grad(out, projections, inputs.dout.double(), materialize_grads=True)
    return [out.detach(), *gradients]


def worst(got: list[Tensor], truth: list[Tensor]) -> float:
    """Error of the output, and of each part of the gradients by the norm of all."""
    assert len(got) == len(truth) and all(a.shape == b.shape for a, b in zip(got, truth))
    norm = torch.cat([x.flatten() for x in truth[1:]]).norm() if len(truth) > 1 else truth[0].norm()
    found = [(got[0].double() - truth[0]).norm() / truth[0].norm().clamp_min(1e-30)]
    for a, b in zip(got[1:], truth[1:]):
        found += [difference.norm() / norm.clamp_min(1e-30) for difference in (a.double() - b).unbind(2)]
    return torch.stack(found).max().item()  # NaN stays NaN, and is smaller than no bound


def same_in_company(kind: Kind, inputs: Inputs, i: int) -> bool:
    """Whether sequence i has the same bits between neighbours of NaN, in another place of the pack."""
    k_lengths = kind.q_lengths if kind.k_lengths is None else kind.k_lengths
    streams = [0, *[min(n, 1) for n in range(len(inputs.projections))]]  # of the output and of each projection
    starts = [sum(lengths[:i]) for lengths in (kind.q_lengths, k_lengths)]
    spans = [slice(start, start + lengths[i]) for start, lengths in zip(starts, (kind.q_lengths, k_lengths))]

    def between(x: Tensor, span: slice) -> Tensor:
        company = torch.full_like(x[:1], torch.nan).expand(5, *x.shape[1:])
        return torch.cat((company[:3], x[span], company[3:]))

    projections = [between(x, spans[stream]) for x, stream in zip(inputs.projections, streams[1:])]
    k_lengths = None if kind.k_lengths is None else [3, kind.k_lengths[i], 2]
    moved = replace(kind, q_lengths=[3, kind.q_lengths[i], 2], k_lengths=k_lengths)
    got = attended(moved, Inputs(projections, inputs.table, between(inputs.dout, spans[0])))
    whole = attended(kind, inputs)
    return all(torch.equal(a[3:-2], b[spans[stream]]) for a, b, stream in zip(got, whole, streams))


def run(qkv: Tensor, dout: Tensor, lengths: list[int], rotary) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = packed_attention(qkv, layout_of(lengths, str(qkv.device)).tiles, rotary)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def table(lengths: list[int], head_dim: int, device: str = "cpu"):
    cos, sin = rotary_table(layout_of(lengths, device).positions, head_dim, 10_000.0)
    return cos.flatten(1), sin.flatten(1)


def patch_interpreter() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    patch, dot = interpreter._patch_lang_tensor, builder.create_dot

    def patch_index(tensor, scope):  # numpy ≥ 2.4 makes no number of an array of one element (Triton 3.6)
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot_bf16(self, a, b, *rest):  # the interpreter would multiply the bits of bf16 as integers (Triton 3.6)
        def widen(x):
            bits = x.data
            return interpreter.TensorHandle((bits.astype(np.uint32) << 16).view(np.float32), tl.float32)

        a, b = (widen(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor, builder.create_dot = patch_index, dot_bf16


OPS = {"self, rotary": (True, False), "self, causal": (False, True), "cross": (False, False)}  # rotary, causal


def opcheck(name: str) -> str:
    """What torch finds wrong with the op: schema, registration of the gradient, fakes, tracing."""
    rotates, causal = OPS[name]
    kind = replace(KINDS["cross"], q_lengths=[3, 0, 2], k_lengths=[2, 1, 0] if name == "cross" else None)
    kind = replace(kind, parts=(1, 2) if name == "cross" else (3,))
    projections = [x.requires_grad_() for x in draw(kind, torch.float16).projections]
    q, k = layouts_of(kind)
    other = (q.cu_seqlens, k.tiles, k.cu_seqlens) if name == "cross" else (None, None, None)
    angles = table(kind.q_lengths, kind.head_dim) if rotates else (None, None)
    arguments = (projections, q.tiles, *other, *angles, None, causal, 0.25)
    found = torch.library.opcheck(torch.ops.moltron.packed_attention.default, arguments, raise_exception=False)
    return "; ".join(f"{test}: {result}" for test, result in found.items() if result != "SUCCESS")


def interpret_all() -> dict[str, dict]:
    patch_interpreter()
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN: what no kernel writes shows
    assert torch.empty(1).isnan()
    rotated = {}
    for name, (head_dim, lengths, rotates) in INTERPRETED.items():
        qkv, dout = inputs(lengths, 2, head_dim, torch.float16)
        rotary = table(lengths, head_dim) if rotates else None
        rotated[name] = errors(*run(qkv, dout, lengths, rotary), reference(qkv, rotary, lengths, dout))
    drawn = {name: draw(kind, torch.float16) for name, kind in KINDS.items()}
    kinds = {name: worst(attended(kind, drawn[name]), true_attended(kind, drawn[name])) for name, kind in KINDS.items()}
    company = {name: same_in_company(KINDS[name], drawn[name], i) for name, i in COMPANY.items()}
    return {"rotated": rotated, "kinds": kinds, "company": company, "ops": {name: opcheck(name) for name in OPS}}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_agree_with_float64(interpreted, name):
    assert max(interpreted["rotated"][name].values()) < 1e-3, interpreted["rotated"][name]


@pytest.mark.parametrize("name", KINDS)
def test_interpreted_kinds_agree_with_float64(interpreted, name):
    assert interpreted["kinds"][name] < 1e-3


@pytest.mark.parametrize("name", COMPANY)
def test_interpreted_kinds_do_not_see_their_neighbours(interpreted, name):
    assert interpreted["company"][name] is True


@pytest.mark.parametrize("name", OPS)
def test_op_is_one_that_torch_can_trace(interpreted, name):
    assert interpreted["ops"][name] == ""


# ------------------------------------------------------------------------------------------------------------- GPU

LONG = [*range(1, 18), 0, 64, 65, 127, 128, 129, 500, 1024, 1500, 4500, 320]
WIDTHS = [(20, 16), (20, 24), (20, 32), (20, 64), (3, 128), (5, 40)]


def flash(qkv: Tensor, dout: Tensor, lengths: list[int], rotary) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    cu = layout_of(lengths, "cuda").cu_seqlens
    x = qkv.detach().requires_grad_()
    q, k, v = x.unbind(2)
    cos, sin = (t[:, None] for t in rotary)
    q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
    out = varlen_attn(q, k, v, cu, cu, max(lengths), max(lengths))
    assert isinstance(out, Tensor)
    return out.detach(), torch.autograd.grad(out, x, dout)[0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_heads, head_dim", WIDTHS)
def test_no_less_exact_than_flash_attention_and_every_element_written(num_heads, head_dim, dtype):
    qkv, dout = inputs(LONG, num_heads, head_dim, dtype, "cuda")
    rotary = table(LONG, head_dim, "cuda")
    truth = reference(qkv, rotary, LONG, dout)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        out, grad = run(qkv, dout, LONG, rotary)
    finally:
        torch.use_deterministic_algorithms(False)
    ours, theirs = errors(out, grad, truth), errors(*flash(qkv, dout, LONG, rotary), truth)
    assert all(ours[name] <= 1.1 * theirs[name] for name in ours), (ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads, head_dim", WIDTHS)
def test_bitwise_the_same_again_and_in_other_company(num_heads, head_dim):
    qkv, dout = inputs(LONG, num_heads, head_dim, torch.bfloat16, "cuda")
    rotary = table(LONG, head_dim, "cuda")
    out, grad = run(qkv, dout, LONG, rotary)
    for _ in range(3):
        again = run(qkv, dout, LONG, rotary)
        assert torch.equal(out, again[0]) and torch.equal(grad, again[1])
    start = sum(LONG[:-4])
    span = slice(start, start + LONG[-4])  # the sequence of 1,024 alone, beside NaN
    company = torch.full((LONG[-4] + 7, *qkv.shape[1:]), torch.nan, dtype=qkv.dtype, device="cuda")
    company[7:] = qkv[span]
    dcompany = torch.full((LONG[-4] + 7, *dout.shape[1:]), torch.nan, dtype=qkv.dtype, device="cuda")
    dcompany[7:] = dout[span]
    lengths = [7, LONG[-4]]
    alone = run(company, dcompany, lengths, table(lengths, head_dim, "cuda"))
    assert torch.equal(alone[0][7:], out[span]) and torch.equal(alone[1][7:], grad[span])


@pytest.mark.gpu
def test_compiled_whole_and_replayed_as_a_graph():
    lengths = [270, 1024, 33, 721]
    qkv, dout = inputs(lengths, 20, 16, torch.bfloat16, "cuda")
    rotary = table(lengths, 16, "cuda")
    expected = run(qkv, dout, lengths, rotary)
    tiles = layout_of(lengths, "cuda").tiles
    x = qkv.detach().requires_grad_()
    compiled = torch.compile(lambda x: packed_attention(x + 0, tiles, rotary), fullgraph=True)
    out = compiled(x)
    assert torch.equal(out, expected[0]) and torch.equal(torch.autograd.grad(out, x, dout)[0], expected[1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = qkv.detach().requires_grad_()  # a leaf of this stream: autograd may not wait for another one
        again = packed_attention(x, tiles, rotary)
        (grad,) = torch.autograd.grad(again, x, dout)
    again.detach().zero_()
    grad.zero_()
    graph.replay()
    assert torch.equal(again, expected[0]) and torch.equal(grad, expected[1])
    with torch.inference_mode():
        assert torch.equal(packed_attention(qkv, tiles, rotary), expected[0])


# As in the interpreter, and long enough to fill the pipelines.
GPU_KINDS = {
    "bidirectional": Kind(0, LONG),
    "causal": Kind(0, LONG, causal=True),
    "causal, views": Kind(0, LONG, parts=None, causal=True),
    "cross": Kind(0, LONG, LONG[::-1], (1, 2)),
    "cross, views": Kind(0, LONG, LONG[7:] + LONG[:7], None),
    "bias": Kind(0, LONG, radius=128),
    "causal bias": Kind(0, LONG, causal=True, radius=128),
    "cross bias": Kind(0, LONG, LONG[::-1], (1, 2), radius=20),
}
GPU_KINDS = {
    f"{name}, width {H}": replace(kind, head_dim=H, scale=H**-0.5, num_heads=5)
    for name, kind in GPU_KINDS.items()
    for H in (16, 24, 64, 128)
}
WHOLE = ["bidirectional", "causal", "cross", "bias", "causal bias", "cross bias"]  # projections are of one stream each
EMPTY = {name: kind for name, kind in KINDS.items() if kind.head_dim == 8}


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_KINDS | EMPTY)
def test_kinds_agree_with_float64_and_write_every_element(name):
    kind = (GPU_KINDS | EMPTY)[name]
    drawn = draw(kind, torch.bfloat16, "cuda")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    try:
        got = attended(kind, drawn)
    finally:
        torch.use_deterministic_algorithms(False)
    assert worst(got, true_attended(kind, drawn)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("name", [f"{name}, width {H}" for name in WHOLE for H in (16, 24, 64, 128)])
def test_kinds_are_bitwise_the_same_again_and_in_other_company(name):
    kind = GPU_KINDS[name]
    drawn = draw(kind, torch.bfloat16, "cuda")
    first = attended(kind, drawn)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, attended(kind, drawn)))
    for i in (LONG.index(129), LONG.index(1024), LONG.index(17)):
        assert same_in_company(kind, drawn, i)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal, width 64", "cross, width 64", "cross, views, width 64", "bias, width 64"])
def test_kinds_compiled_whole(name):
    kind = GPU_KINDS[name]
    drawn = draw(kind, torch.bfloat16, "cuda")
    expected = attended(kind, drawn)
    layouts = layouts_of(kind, "cuda")
    settings: dict[str, Any] = dict(causal=kind.causal, bias_table=drawn.table, scale=kind.scale)
    projections = [x.detach().requires_grad_(kind.radius is None) for x in drawn.projections]

    def attend(*given: Tensor) -> Tensor:
        projections = [x + 0 for x in given]
        if kind.parts is None:
            q, k, v = parts_of(kind, projections)
            return attend_projections([x[:, :, None] for x in (q, k, v)], *layouts, **settings)
        return attend_projections(projections, *layouts, **settings)

    out = torch.compile(attend, fullgraph=True)(*projections)
    got = [out, *(torch.autograd.grad(out, projections, drawn.dout) if kind.radius is None else ())]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


if __name__ == "__main__":
    print(json.dumps(interpret_all()))
