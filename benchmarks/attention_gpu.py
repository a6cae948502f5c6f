"""Attention of a block on one GPU: the Triton op beside varlen flash attention (FA2) with compiled rotation.

    PYTHONPATH=src python3 benchmarks/attention_gpu.py [--shapes 8M 650M] [--output results.md]

For the shapes of ESM-2 in bf16: milliseconds from qkv to its gradient, rotation included, on protein-like lengths; and
the error against float64 on hard lengths, the norm of the difference by the norm of the truth.
Bound: the largest of exponentials (16 a clock a multiprocessor), tensor cores (800 TF/s) and bytes (3 TB/s), over the
real scores (Σ length² · N), each exponential taken once a pass. T tokens, N heads, H head width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from triton.testing import do_bench

from moltron.layers.layout import Layout
from moltron.layers.positions import apply_rotary, rotary_table
from moltron.layers.triton_attention import packed_attention

SHAPES = {  # T, N, H
    "8M": (131_072, 20, 16),
    "35M": (65_536, 20, 24),
    "150M": (65_536, 20, 32),
    "650M": (32_768, 20, 64),
    "3B": (8_192, 40, 64),
    "15B": (8_192, 40, 128),
}
HARD_LENGTHS = [*range(1, 18), 64, 65, 127, 128, 129, 255, 500, 1024, 1023, 1500, 330]
CLOCK_HZ, SMS, FLOPS, BYTES = 1.755e9, 132, 800e12, 3.0e12  # an H100
COLUMNS = ["shape", "T", "N × H", "forward ms", "backward ms", "both ms", "FA2 both ms", "times faster", "of the bound"]
COLUMNS += ["errors of out, dq, dk, dv", "FA2's errors"]


def protein_lengths(num_tokens: int, seed: int = 0) -> list[int]:
    """Lognormal, median 270, mean 330, at most 1,024; the last ones fill up as filler does."""
    draws = np.random.default_rng(seed).lognormal(math.log(270), math.sqrt(2 * math.log(330 / 270)), num_tokens // 50)
    draws = draws.clip(30, 1024).astype(int)
    lengths = draws[: np.searchsorted(draws.cumsum(), num_tokens, side="right")].tolist()
    rest = num_tokens - sum(lengths)
    return lengths + [1024] * (rest // 1024) + ([rest % 1024] if rest % 1024 else [])


class Work:
    """Inputs of one shape, and the two ways to compute the attention of a block."""

    def __init__(self, lengths: list[int], num_heads: int, head_dim: int):
        generator = torch.Generator("cuda").manual_seed(1)
        draw: dict[str, Any] = dict(device="cuda", generator=generator)
        self.lengths = lengths
        self.layout = Layout.of(np.array(lengths)).to("cuda")
        self.rotary = rotary_table(self.layout.positions, head_dim, 10_000.0)
        self.qkv = torch.randn(sum(lengths), num_heads, 3, head_dim, **draw).bfloat16().requires_grad_()
        self.dout = torch.randn(sum(lengths), num_heads, head_dim, **draw).bfloat16()

    def ours(self, qkv: Tensor) -> Tensor:
        return packed_attention(qkv, self.layout.tiles, self.rotary)

    def flash(self, qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(2)
        q, k, cu = apply_rotary(q, *self.rotary), apply_rotary(k, *self.rotary), self.layout.cu_seqlens
        out = varlen_attn(q, k, v, cu, cu, *2 * [max(self.layout.lengths)])
        assert isinstance(out, Tensor)
        return out

    def truth(self) -> tuple[Tensor, Tensor]:
        """Output and gradient in float64, one sequence at a time."""
        qkv = self.qkv.detach().double().requires_grad_()
        q, k, v = qkv.unbind(2)
        q, k = (apply_rotary(x, *(t.double() for t in self.rotary)) for x in (q, k))
        outs = []
        for q1, k1, v1 in zip(*(x.split(self.lengths) for x in (q, k, v))):
            scores = torch.einsum("qnh,knh->nqk", q1, k1) * q1.shape[-1] ** -0.5
            outs.append(torch.einsum("nqk,knh->qnh", scores.softmax(-1), v1))
        out = torch.cat(outs)
        return out.detach(), torch.autograd.grad(out, qkv, self.dout.double())[0]

    def bound_ms(self) -> float:
        T, N, _, H = self.qkv.shape
        scores = float(np.square(np.array(self.lengths, dtype=np.float64)).sum()) * N
        exponentials = scores / (SMS * 16 * CLOCK_HZ)
        forward = max(exponentials, 4 * H * scores / FLOPS, 4 * 2 * T * N * H / BYTES)
        return 1e3 * (forward + max(exponentials, 10 * H * scores / FLOPS, 8 * 2 * T * N * H / BYTES))


def errors(work: Work, call: Callable[[Tensor], Tensor], truth: tuple[Tensor, Tensor]) -> list[float]:
    """Of the output and of dq, dk, dv."""
    out = call(work.qkv)
    (gradient,) = torch.autograd.grad(out, work.qkv, work.dout)
    pairs = [(out, truth[0]), *zip(gradient.unbind(2), truth[1].unbind(2))]
    return [((got.double() - want).norm() / want.norm()).item() for got, want in pairs]


def milliseconds(work: Work, call: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    """Medians: without a gradient, and with it."""
    time: dict[str, Any] = dict(warmup=20, rep=100, return_mode="median")
    with torch.no_grad():
        forward = do_bench(lambda: call(work.qkv), **time)
    return forward, do_bench(lambda: torch.autograd.grad(call(work.qkv), work.qkv, work.dout), **time)


def measure(name: str) -> tuple[str, bool]:
    """A row of the table; whether the op is as exact as FA2 (to 10 %) and repeats bit for bit."""
    T, N, H = SHAPES[name]
    hard = Work(HARD_LENGTHS, N, H)
    truth = hard.truth()
    ours, theirs = errors(hard, hard.ours, truth), errors(hard, hard.flash, truth)
    first, second = (torch.autograd.grad(hard.ours(hard.qkv), hard.qkv, hard.dout)[0] for _ in range(2))
    right = torch.equal(first, second) and all(a <= 1.1 * b for a, b in zip(ours, theirs))
    work = Work(protein_lengths(T), N, H)
    forward, both = milliseconds(work, work.ours)
    _, flash = milliseconds(work, torch.compile(work.flash, dynamic=False))
    cells = [name, f"{T:,}", f"{N} × {H}", f"{forward:.3f}", f"{both - forward:.3f}", f"{both:.3f}", f"{flash:.3f}"]
    cells += [f"{flash / both:.2f}", f"{work.bound_ms() / both:.0%}"]
    cells += [" ".join(f"{error:.1e}" for error in found) for found in (ours, theirs)]
    return f"| {' | '.join(cells)} |", right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--output", type=Path, help="also write the table into this Markdown file")
    arguments = parser.parse_args()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    lines = [f"# Attention with rotation: {where}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    print("\n".join(lines), flush=True)
    wrong = []
    for name in arguments.shapes:
        row, right = measure(name)
        print(row, flush=True)
        lines.append(row)
        if not right:
            wrong.append(name)
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")
    if wrong:
        raise SystemExit(f"less exact than FA2, or not the same twice: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
