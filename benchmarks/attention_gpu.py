"""Packed attention on one GPU: which variant of moltron.layers.triton_attention is right, and which is fastest.

    PYTHONPATH=src python3 benchmarks/attention_gpu.py [--shapes 8M,650M] [--out results.json]

For the shapes of ESM-2 on protein-like lengths it compiles every variant in parallel processes, compares each with
float64 on hard lengths, and times it beside varlen flash attention (FA2). Dimensions: T tokens, N heads, H head width.

Bound: the largest of exponentials (16 a clock a multiprocessor), tensor cores (800 TF/s) and bytes (3 TB/s), over the
real scores (Σ length² · N), each exponential taken once a pass.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from triton.testing import do_bench

from moltron.layers import triton_attention as ta
from moltron.layers.positions import apply_rotary, rotary_table
from moltron.layers.triton_attention import Config, Tuning

SHAPES = {  # name: T, N, H
    "8M": (131_072, 20, 16),
    "35M": (65_536, 20, 24),
    "150M": (65_536, 20, 32),
    "650M": (32_768, 20, 64),
    "3B": (8_192, 40, 64),
    "15B": (8_192, 40, 128),
}
HARD_LENGTHS = [*range(1, 18), 64, 65, 127, 128, 129, 255, 500, 1024, 1023, 1500, 330]
CLOCK_HZ, SMS, FLOPS, BYTES = 1.755e9, 132, 800e12, 3.0e12


def variants(head_dim: int) -> dict[str, list[Config]]:
    """What to measure of each kernel; the first of a list is the default while others vary."""
    if head_dim <= 32:
        return {
            "forward": [
                Config(64, 128, 4), Config(64, 64, 4), Config(128, 64, 4), Config(128, 64, 8), Config(128, 128, 8),
                Config(64, 64, 4, 3), Config(64, 128, 4, 3),
            ],
            "dq": [
                Config(64, 64, 4), Config(64, 128, 4), Config(128, 64, 8), Config(128, 64, 4), Config(64, 64, 4, 3),
            ],
            "dkdv": [
                Config(64, 64, 4), Config(64, 64, 4, 2, 128), Config(64, 128, 4), Config(128, 64, 4),
                Config(128, 128, 8), Config(64, 128, 8, 2, 128), Config(64, 64, 4, 3),
            ],
            "serial": [
                Config(64, 64, 4), Config(64, 64, 4, 2, 128), Config(64, 128, 8), Config(64, 128, 8, 2, 128),
                Config(128, 128, 8), Config(32, 128, 4), Config(64, 64, 4, 2, 168),
            ],
            "atomic": [Config(64, 64, 4), Config(64, 64, 4, 2, 128), Config(64, 128, 8), Config(64, 128, 8, 2, 128)],
        }  # fmt: skip
    if head_dim == 64:
        return {
            "forward": [
                Config(128, 64, 8), Config(64, 64, 4), Config(128, 128, 8), Config(64, 128, 4), Config(64, 64, 4, 3),
                Config(128, 64, 4), Config(128, 64, 8, 3),
            ],
            "dq": [
                Config(64, 64, 4), Config(128, 64, 8), Config(64, 64, 4, 3), Config(128, 64, 8, 3), Config(64, 128, 4),
            ],
            "dkdv": [
                Config(64, 64, 4), Config(64, 128, 8), Config(64, 64, 4, 3), Config(128, 64, 8), Config(128, 128, 8),
                Config(64, 64, 4, 2, 168),
            ],
            "serial": [Config(64, 64, 4), Config(64, 128, 8), Config(64, 64, 8)],
            "atomic": [Config(64, 64, 4), Config(64, 128, 8), Config(64, 64, 8)],
        }  # fmt: skip
    return {
        "forward": [Config(128, 64, 8), Config(64, 64, 4), Config(128, 128, 8), Config(128, 64, 8, 3)],
        "dq": [Config(64, 64, 8), Config(64, 64, 4), Config(128, 64, 8)],
        "dkdv": [Config(64, 64, 8), Config(64, 64, 4), Config(128, 64, 8), Config(32, 64, 4)],
        "serial": [Config(64, 64, 8)],
        "atomic": [Config(64, 64, 8), Config(64, 64, 4)],
    }


def protein_lengths(num_tokens: int, seed: int = 0) -> list[int]:
    """Lognormal, median 270, mean 330, at most 1,024; the last ones fill up as filler does."""
    draws = np.random.default_rng(seed).lognormal(math.log(270), math.sqrt(2 * math.log(330 / 270)), num_tokens // 50)
    draws = draws.clip(30, 1024).astype(int)
    lengths = draws[: np.searchsorted(draws.cumsum(), num_tokens, side="right")].tolist()
    rest = num_tokens - sum(lengths)
    return lengths + [1024] * (rest // 1024) + ([rest % 1024] if rest % 1024 else [])


class Work:
    """Inputs of one shape, and its tile tables by block."""

    def __init__(self, lengths: list[int], num_heads: int, head_dim: int, dtype: torch.dtype = torch.bfloat16):
        generator = torch.Generator("cuda").manual_seed(1)
        self.lengths, self.T = lengths, sum(lengths)
        draw = dict(device="cuda", generator=generator)
        self.qkv = torch.randn(self.T, num_heads, 3, head_dim, **draw).to(dtype)
        self.dout = torch.randn(self.T, num_heads, head_dim, **draw).to(dtype)
        self.cu = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device="cuda")
        positions = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).cuda()
        self.rotary = rotary_table(positions, head_dim, 10_000.0)
        self.cos, self.sin = (x.flatten(1) for x in self.rotary)
        self.tables: dict[int, Tensor] = {}
        self.longest = max(lengths)

    def tiles(self, block: int) -> Tensor:
        if block not in self.tables:
            self.tables[block] = ta.tile_table(self.cu, self.T, block)
        return self.tables[block]

    def rotate(self) -> Tensor:
        return ta.rotate(self.qkv, self.cos, self.sin)

    def forward(self, qk: Tensor, config: Config) -> tuple[Tensor, Tensor]:
        return ta.run_forward(self.qkv, qk, self.tiles(config.block_m), config)

    def backward(self, qk: Tensor, out: Tensor, lse: Tensor, tuned: Tuning) -> Tensor:
        keys = self.tiles(self.T if tuned.mode == "serial" else tuned.dkdv.block_n)
        tiles_m = self.tiles(tuned.dq.block_m)
        return ta.run_backward(self.qkv, qk, out, lse, self.dout, self.cos, self.sin, tiles_m, keys, tuned)

    def flash_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv.unbind(2)
        return tuple(x.detach().requires_grad_() for x in (q, k, v))

    def flash(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, self.cu, self.cu, self.longest, self.longest)


def reference(work: Work) -> tuple[Tensor, Tensor]:
    """Output and gradient in float64, one sequence at a time."""
    x = work.qkv.double().requires_grad_()
    cos, sin = work.cos.double()[:, None, None], work.sin.double()[:, None, None]
    first, second = x[:, :, :2].chunk(2, dim=-1)
    q, k = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).unbind(2)
    out = torch.cat([
        torch.einsum("nqk,knh->qnh", (torch.einsum("qnh,knh->nqk", a, b) * a.shape[-1] ** -0.5).softmax(-1), c)
        for a, b, c in zip(q.split(work.lengths), k.split(work.lengths), x[:, :, 2].split(work.lengths))
    ])  # fmt: skip
    return out.detach(), torch.autograd.grad(out, x, work.dout.double())[0]


def relative(value: Tensor, truth: Tensor) -> float:
    error = ((value.double() - truth).norm() / truth.norm()).item()
    return error if math.isfinite(error) else math.inf


def tuned_with(head_dim: int, kernel: str, config: Config) -> Tuning:
    first = {name: configs[0] for name, configs in variants(head_dim).items()}
    if kernel in ("serial", "atomic"):
        return Tuning(first["forward"], first["dq"], config, kernel)
    chosen = {name: first[name] for name in ("forward", "dq", "dkdv")} | {kernel: config}
    return Tuning(**chosen)


def jobs() -> list[tuple[int, int, str, Config]]:
    shapes = dict.fromkeys((n, h) for _, n, h in SHAPES.values())
    return [(n, h, kernel, c) for n, h in shapes for kernel, configs in variants(h).items() for c in configs]


def compile_job(job: tuple[int, int, str, Config]) -> tuple[tuple, str]:
    """Run a variant once on a few tokens, which leaves it in Triton's cache on disk."""
    num_heads, head_dim, kernel, config = job
    try:
        work = Work([100, 28], num_heads, head_dim)
        qk = work.rotate()
        tuned = tuned_with(head_dim, kernel, config)
        out, lse = work.forward(qk, tuned.forward)
        if kernel != "forward":
            work.backward(qk, out, lse, tuned)
        torch.cuda.synchronize()
    except Exception as error:
        return job, f"{type(error).__name__}: {str(error)[:120]}"
    return job, ""


def median_ms(call) -> float:
    return do_bench(call, warmup=10, rep=40, return_mode="median")


def bounds_ms(work: Work) -> tuple[float, float]:
    T, N, _, H = work.qkv.shape
    scores = float(np.square(np.array(work.lengths, dtype=np.float64)).sum()) * N
    exponentials = scores / (SMS * 16 * CLOCK_HZ)
    forward = max(exponentials, 4 * H * scores / FLOPS, 4 * 2 * T * N * H / BYTES)
    return forward * 1e3, max(exponentials, 10 * H * scores / FLOPS, 8 * 2 * T * N * H / BYTES) * 1e3


def measure(name: str, failed: dict[tuple, str], rows: list[dict]) -> None:
    T, N, H = SHAPES[name]
    hard, work = Work([*HARD_LENGTHS, 160 - sum(HARD_LENGTHS) % 16], N, H), Work(protein_lengths(T), N, H)
    truth, grad_truth = reference(hard)
    bound_f, bound_b = bounds_ms(work)

    q, k, v = work.flash_inputs()
    flash_f = median_ms(lambda: work.flash(q.detach(), k.detach(), v.detach()))
    out = work.flash(q, k, v)
    flash_b = median_ms(lambda: torch.autograd.grad(out, (q, k, v), work.dout, retain_graph=True))
    x = hard.qkv.detach().requires_grad_()
    hq, hk, hv = x.unbind(2)
    hout = hard.flash(apply_rotary(hq, *hard.rotary), apply_rotary(hk, *hard.rotary), hv)
    hgrad = torch.autograd.grad(hout, x, hard.dout)[0]
    fa = dict(shape=name, kernel="FA2", forward=flash_f, backward=flash_b)
    fa |= dict(
        error_out=relative(hout, truth), error_grad=[relative(hgrad[:, :, i], grad_truth[:, :, i]) for i in range(3)]
    )
    rows.append(fa)
    del out, hout

    qk, hard_qk = work.rotate(), hard.rotate()
    rotate_ms = median_ms(work.rotate)
    best: dict[str, tuple[float, Config]] = {}
    for kernel, configs in variants(H).items():
        for config in configs:
            row: dict = dict(shape=name, kernel=kernel, config=list(config))
            rows.append(row)
            if (N, H, kernel, config) in failed:
                row["failed"] = failed[N, H, kernel, config]
                continue
            tuned = tuned_with(H, kernel, config)
            if kernel == "dkdv" and "dq" in best:
                tuned = tuned._replace(dq=best["dq"][1])
            try:
                poison = torch.full_like(hard.qkv, math.nan)  # what comes next reuses its memory
                del poison
                out, lse = hard.forward(hard_qk, tuned.forward)
                row["error_out"] = relative(out, truth)
                if kernel == "forward":
                    row["ms"] = median_ms(lambda c=config: work.forward(qk, c))
                else:
                    grads = [hard.backward(hard_qk, out, lse, tuned) for _ in range(2)]
                    row["repeats"] = torch.equal(*grads)
                    row["error_grad"] = [relative(grads[0][:, :, i], grad_truth[:, :, i]) for i in range(3)]
                    out, lse = work.forward(qk, tuned.forward)
                    row["ms"] = median_ms(lambda o=out, s=lse, t=tuned: work.backward(qk, o, s, t))
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:120]}"
                continue
            right = row["error_out"] <= 1.1 * fa["error_out"] and all(
                ours <= 1.1 * theirs for ours, theirs in zip(row.get("error_grad", []), fa["error_grad"])
            )
            row["right"] = right
            if right and row["ms"] < best.get(kernel, (math.inf, config))[0]:
                best[kernel] = (row["ms"], config)

    print(f"\n{name}: T {T}, {N} x {H}; bound fwd {bound_f:.3f} bwd {bound_b:.3f} ms; rotate q,k {rotate_ms:.3f} ms")
    grads = " ".join(f"{e:.1e}" for e in fa["error_grad"])
    print(f"  FA2      fwd {flash_f:.3f} bwd {flash_b:.3f} both {flash_f + flash_b:.3f};", end="")
    print(f" errors {fa['error_out']:.1e} {grads}")
    for kernel in variants(H):
        print(f"  {kernel:8}", end="")
        for row in (r for r in rows if r["shape"] == name and r["kernel"] == kernel):
            config = "x".join(str(c) for c in row["config"] if c is not None)
            mark = "" if row.get("right") else " WRONG"
            print(f" {config} " + (row["failed"][:60] if "failed" in row else f"{row['ms']:.3f}{mark}") + ";", end="")
        print()
    sums = {m: best[m][0] for m in ("dkdv", "serial", "atomic") if m in best}
    if "forward" in best and sums:
        mode = min(sums, key=sums.__getitem__)
        ours_f, ours_b = best["forward"][0], sums[mode]
        errors = next(
            r for r in rows if r["shape"] == name and r["kernel"] == mode and r["config"] == list(best[mode][1])
        )
        grads = " ".join(f"{e:.1e}" for e in errors["error_grad"])
        print(f"  best     fwd {ours_f:.3f} ({flash_f / ours_f:.2f}x FA2, {bound_f / ours_f:.0%} of bound)"
              f" bwd {mode} {ours_b:.3f} ({flash_b / ours_b:.2f}x, {bound_b / ours_b:.0%})"
              f" both {(flash_f + flash_b) / (ours_f + ours_b):.2f}x;"
              f" errors {errors['error_out']:.1e} {grads}; repeats {errors['repeats']}")  # fmt: skip


def compare_whole(name: str) -> str:
    """What a block sees: rotation, attention, gradient of qkv. FA2's rotation is compiled, as the blocks are."""
    T, N, H = SHAPES[name]
    work = Work(protein_lengths(T), N, H)
    tiles = ta.make_tiles(work.cu, work.T, H)
    x = work.qkv.detach().requires_grad_()

    def flash(x: Tensor) -> Tensor:
        q, k, v = x.unbind(2)
        return work.flash(apply_rotary(q, *work.rotary), apply_rotary(k, *work.rotary), v)

    times = []
    for call in (torch.compile(flash, dynamic=False), lambda x: ta.packed_attention(x, tiles, work.rotary)):
        times.append(median_ms(lambda c=call: torch.autograd.grad(c(x), x, work.dout)))
    table_ms = median_ms(lambda: ta.make_tiles(work.cu, work.T, H))
    return f"{name}: FA2 and compiled rope {times[0]:.3f} ms, the op {times[1]:.3f} ms; tiles {table_ms:.3f} ms a batch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated names")
    parser.add_argument("--out", default="", help="JSON with every figure")
    arguments = parser.parse_args()
    names = arguments.shapes.split(",")
    for name in set(SHAPES) - set(names):
        del SHAPES[name]
    start = time.perf_counter()
    with ProcessPoolExecutor(min(14, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        failed = {job: problem for job, problem in pool.map(compile_job, jobs()) if problem}
    seconds = time.perf_counter() - start
    print(f"{torch.cuda.get_device_name()}; {len(jobs())} variants compiled in {seconds:.0f} s, {len(failed)} failed")
    rows: list[dict] = []
    for name in names:
        measure(name, failed, rows)
        if arguments.out:
            with open(arguments.out, "w") as file:
                json.dump(rows, file, indent=1)
    print(f"\n{time.perf_counter() - start:.0f} s so far", flush=True)
    for name in ("8M", "650M"):
        if name in SHAPES:
            print(compare_whole(name), flush=True)
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
