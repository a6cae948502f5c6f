"""Attention of a block on one GPU: the Triton op beside varlen flash attention (FA2) with compiled rotation.

    PYTHONPATH=src python3 benchmarks/attention_gpu.py [--shapes 8M 650M] [--kinds "ProtT5nv cross"] [--output FILE]

For the shapes of ESM-2 in bf16: milliseconds from qkv to its gradient, rotation included, on protein-like lengths; and
the error against float64 on hard lengths, the norm of the difference by the norm of the truth. A second table has
encoder–decoder models: causal, cross (peer: varlen FA2) and the forward with T5's bias, whose only peer in torch
without padding is SDPA, one call a sequence.
Bound: the largest of exponentials (16 a clock a multiprocessor), tensor cores (800 TF/s) and bytes (3 TB/s), over the
real scores (Σ length² · N), each exponential taken once a pass. T tokens, N heads, H head width.
"""

from __future__ import annotations

import argparse
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from triton.testing import do_bench

from moltron.layers.layout import Layout
from moltron.layers.positions import apply_rotary, rotary_table
from moltron.layers.triton_attention import attend_projections, packed_attention

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


@dataclass(frozen=True)
class Kind:
    """One of the second table. spans: the queries are a decoder's, a quarter of its keys' lengths (T5's labels)."""

    num_tokens: int
    num_heads: int
    head_dim: int
    median: int  # of the lengths
    causal: bool = False
    cross: bool = False
    spans: bool = False
    radius: int | None = None  # of the bias: forward only


KINDS = {
    "ProtT5nv causal": Kind(32_768, 12, 64, 270, causal=True),
    "ProtT5nv cross": Kind(32_768, 12, 64, 270, cross=True, spans=True),
    "MegaMolBART causal": Kind(32_768, 8, 64, 45, causal=True),
    "MegaMolBART cross": Kind(32_768, 8, 64, 45, cross=True),
    "width 32 causal": Kind(65_536, 8, 32, 45, causal=True),
    "width 128 causal": Kind(16_384, 32, 128, 270, causal=True),
    "width 128 cross": Kind(16_384, 32, 128, 270, cross=True),
    "ProtT5-XL bias": Kind(16_384, 32, 128, 270, radius=128),
    "ProtT5-XL causal bias": Kind(16_384, 32, 128, 270, causal=True, radius=128),
}
KIND_COLUMNS = ["kind", "T", "S", "N × H", "forward ms", "backward ms", "peer", "its forward ms", "its backward ms"]
KIND_COLUMNS += ["times faster", "errors of out and gradients", "the peer's errors"]


def protein_lengths(num_tokens: int, seed: int = 0, median: int = 270) -> list[int]:
    """Lognormal, mean 330 by median 270, median / 9 to 1,024; the last ones fill up as filler does."""
    spread = math.sqrt(2 * math.log(330 / 270))
    draws = np.random.default_rng(seed).lognormal(math.log(median), spread, num_tokens * 5 // median)
    draws = draws.clip(median // 9, 1024).astype(int)
    lengths = draws[: np.searchsorted(draws.cumsum(), num_tokens, side="right")].tolist()
    rest = num_tokens - sum(lengths)
    return lengths + [1024] * (rest // 1024) + ([rest % 1024] if rest % 1024 else [])


class Work:
    """Inputs of one shape, and the two ways to compute the attention of a block."""

    def __init__(self, lengths: list[int], num_heads: int, head_dim: int):
        generator = torch.Generator("cuda").manual_seed(1)
        draw: dict[str, Any] = dict(device="cuda", generator=generator)
        self.lengths = lengths
        self.layout = Layout.of(np.array(lengths)).each(lambda x: x.to("cuda"))
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
    with torch.no_grad():
        forward = median_ms(lambda: call(work.qkv))
    return forward, median_ms(lambda: torch.autograd.grad(call(work.qkv), work.qkv, work.dout))


def median_ms(call: Callable[[], Any]) -> float:
    found: Any = do_bench(call, warmup=20, rep=100, return_mode="median")
    return found


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


class KindWork:
    """Inputs of one row of the second table, and the ways to compute it. Projections: [qkv], or [q, kv]."""

    def __init__(self, kind: Kind, keys: list[int]):
        self.kind, N, H = kind, kind.num_heads, kind.head_dim
        self.keys = keys
        self.queries = [max(1, n // 4) for n in keys] if kind.spans else keys
        self.k_layout = Layout.of(np.array(keys)).each(lambda x: x.to("cuda"))
        self.q_layout = self.k_layout
        if kind.cross:
            self.q_layout = Layout.of(np.array(self.queries)).each(lambda x: x.to("cuda"))
        generator = torch.Generator("cuda").manual_seed(1)
        draw: dict[str, Any] = dict(device="cuda", generator=generator)
        T, S = sum(self.queries), sum(keys)
        shapes = [(T, N, 1, H), (S, N, 2, H)] if kind.cross else [(S, N, 3, H)]
        learns = kind.radius is None
        self.projections = [torch.randn(*shape, **draw).bfloat16().requires_grad_(learns) for shape in shapes]
        self.table = None if kind.radius is None else torch.randn(N, 2 * kind.radius + 1, **draw)
        self.dout = torch.randn(T, N, H, **draw).bfloat16()
        self.scale = H**-0.5

    def ours(self) -> Tensor:
        settings: dict[str, Any] = dict(causal=self.kind.causal, bias_table=self.table, scale=self.scale)
        return attend_projections(self.projections, self.q_layout, self.k_layout, **settings)

    def flash(self) -> Tensor:
        causal: dict[str, Any] = {}
        if self.kind.causal:  # the argument's name changed between torch 2.10 and 2.12
            old = "is_causal" in inspect.signature(varlen_attn).parameters
            causal = {"is_causal": True} if old else {"window_size": (-1, 0)}
        q, k, v = parts(self.projections)
        cu = self.q_layout.cu_seqlens, self.k_layout.cu_seqlens
        out = varlen_attn(q, k, v, *cu, max(self.queries), max(self.keys), **causal)
        assert isinstance(out, Tensor)
        return out

    def sdpa(self, projections: list[Tensor] | None = None) -> Tensor:
        """One sequence at a time, the mask made for each; in the dtype of the projections."""
        q, k, v = parts(projections or self.projections)
        outs = []
        for q1, k1, v1 in zip(q.split(self.queries), k.split(self.keys), v.split(self.keys), strict=True):
            away = torch.arange(len(k1), device="cuda") - torch.arange(len(q1), device="cuda")[:, None]
            mask = torch.zeros(1, len(q1), len(k1), device="cuda", dtype=q.dtype)
            if self.table is not None and self.kind.radius is not None:
                mask = self.table.to(q.dtype)[:, away.clamp(-self.kind.radius, self.kind.radius) + self.kind.radius]
            if self.kind.causal:
                mask = mask.masked_fill(away > 0, -torch.inf)
            heads = [x.transpose(0, 1)[None] for x in (q1, k1, v1)]
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask[None], scale=self.scale)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def results(self, call: Callable[..., Tensor], exact: bool = False) -> list[Tensor]:
        """Output, and the gradient of each projection where there is one; in float64 if exact."""
        projections = self.projections
        if exact:
            projections = [x.detach().double().requires_grad_(x.requires_grad) for x in projections]
        out = call(projections) if exact else call()
        found = [out.detach()]
        if self.table is None:
            found += torch.autograd.grad(out, projections, self.dout.to(out.dtype))
        return found

    def milliseconds(self, call: Callable[[], Tensor]) -> tuple[float, float | None]:
        """Medians: forward, and backward where there is one."""
        with torch.no_grad():
            forward = median_ms(call)
        if self.table is not None:
            return forward, None
        both = median_ms(lambda: torch.autograd.grad(call(), self.projections, self.dout))
        return forward, both - forward


def parts(projections: list[Tensor]) -> list[Tensor]:
    return [part for x in projections for part in x.unbind(2)]


def measure_kind(name: str) -> tuple[str, bool]:
    """A row of the second table; whether the op is as exact as its peer (to 10 %) and repeats bit for bit."""
    kind = KINDS[name]
    hard = KindWork(kind, HARD_LENGTHS)
    truth = hard.results(hard.sdpa, exact=True)
    peer = "varlen FA2" if kind.radius is None else "SDPA by sequence"
    found, again = hard.results(hard.ours), hard.results(hard.ours)
    theirs = hard.results(hard.flash if kind.radius is None else hard.sdpa)
    wrong = [[((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, truth)] for got in (found, theirs)]
    right = all(map(torch.equal, found, again)) and all(a <= 1.1 * b for a, b in zip(*wrong))
    work = KindWork(kind, protein_lengths(kind.num_tokens, median=kind.median))
    forward, backward = work.milliseconds(work.ours)
    peer_forward, peer_backward = work.milliseconds(work.flash if kind.radius is None else work.sdpa)
    times = (peer_forward + (peer_backward or 0)) / (forward + (backward or 0))
    cells = [name, f"{sum(work.queries):,}", f"{sum(work.keys):,}", f"{kind.num_heads} × {kind.head_dim}"]
    cells += [f"{forward:.3f}", "" if backward is None else f"{backward:.3f}", peer, f"{peer_forward:.3f}"]
    cells += ["" if peer_backward is None else f"{peer_backward:.3f}", f"{times:.2f}"]
    cells += [" ".join(f"{error:.1e}" for error in errors) for errors in wrong]
    return f"| {' | '.join(cells)} |", right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--output", type=Path, help="also write the tables into this Markdown file")
    arguments = parser.parse_args()
    where = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    wrong = []
    tables = [
        ("Attention with rotation", COLUMNS, arguments.shapes, measure),
        ("Attention of encoder–decoder models", KIND_COLUMNS, arguments.kinds, measure_kind),
    ]
    for title, columns, names, row_of in tables:
        say(f"# {title}: {where}\n\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
        for name in names:
            row, right = row_of(name)
            say(row)
            if not right:
                wrong.append(name)
        say("")
    if arguments.output:
        arguments.output.write_text("\n".join(lines))
    if wrong:
        raise SystemExit(f"less exact than its peer, or not the same twice: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
