"""The Triton attention op: every kernel in Triton's interpreter on the CPU, the compiled ones under the marker `gpu`.

The interpreter must be chosen before Triton is first imported, so those cases run in a process of their own, which this
file is too: `TRITON_INTERPRET=1 python test_triton_attention.py` prints the relative errors as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: CUDA builds of torch and the extra dev bring it")

from moltron.layers.layout import Layout
from moltron.layers.positions import apply_rotary, rotary_table
from moltron.layers.triton_attention import packed_attention

INTERPRETED = {  # head width, lengths, rotary
    "lengths around the tile's": (16, [1, 17, 64, 70, 130], True),
    "no rotation": (16, [70, 5], False),
    "width padded": (24, [64, 3, 65], True),
    "empty sequences": (32, [0, 20, 0], True),
    "one token": (8, [1], True),
}


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
    return Layout.of(np.array(lengths)).to(device)


def run(qkv: Tensor, dout: Tensor, lengths: list[int], rotary) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = packed_attention(qkv, layout_of(lengths, str(qkv.device)).tiles, rotary)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


def table(lengths: list[int], head_dim: int, device: str = "cpu"):
    cos, sin = rotary_table(layout_of(lengths, device).positions, head_dim, 10_000.0)
    return cos.flatten(1), sin.flatten(1)


def interpret_all() -> dict[str, dict[str, float]]:
    import triton.language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_index(tensor, scope):  # numpy ≥ 2.4 makes no number of an array of one element (Triton 3.6)
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot_bf16(self, a, b, *rest):  # the interpreter would multiply the bits of bf16 as integers (Triton 3.6)
        def widen(x):
            bits = x.data
            return interpreter.TensorHandle((bits.astype(np.uint32) << 16).view(np.float32), tl.float32)

        a, b = (widen(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot = patch_index, dot_bf16
    found = {}
    for name, (head_dim, lengths, rotates) in INTERPRETED.items():
        qkv, dout = inputs(lengths, 2, head_dim, torch.float16)
        rotary = table(lengths, head_dim) if rotates else None
        found[name] = errors(*run(qkv, dout, lengths, rotary), reference(qkv, rotary, lengths, dout))
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_agree_with_float64(interpreted, name):
    assert max(interpreted[name].values()) < 1e-3, interpreted[name]


@pytest.mark.parametrize("head_dim", [12, 136])
def test_head_widths_that_do_not_fit_are_refused(head_dim):
    with pytest.raises(ValueError, match="multiples of 8"):
        packed_attention(torch.empty(4, 2, 3, head_dim), layout_of([4]).tiles, None)


@pytest.mark.parametrize("rotates", [True, False])
def test_the_op_traces_without_a_device(rotates):
    qkv = torch.empty(32, 2, 3, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.empty(32, 1, 8, device="meta")
    out = packed_attention(qkv, layout_of([32], "meta").tiles, (angles, angles) if rotates else None)
    out.sum().backward()
    assert out.shape == (32, 2, 16) and qkv.grad is not None and qkv.grad.shape == qkv.shape


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
        again = packed_attention(x, tiles, rotary)
        (grad,) = torch.autograd.grad(again, x, dout)
    again.detach().zero_()
    grad.zero_()
    graph.replay()
    assert torch.equal(again, expected[0]) and torch.equal(grad, expected[1])
    with torch.inference_mode():
        assert torch.equal(packed_attention(qkv, tiles, rotary), expected[0])


if __name__ == "__main__":
    print(json.dumps(interpret_all()))
