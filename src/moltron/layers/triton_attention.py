"""Attention for short, bidirectional, packed sequences on CUDA: Triton kernels behind one custom op.

    qkv ──rotate──> qk ──forward──> out, lse        one program: BLOCK_M queries of one head of one sequence
                     └──dq, dkdv──> dqkv            written once, in the layout of qkv, the rotation undone on the way

Protein sequences are short (median 270), so the work is a list of tiles of whole sequences, longest first, made once a
forward pass (`tile_table`) and shared by all layers: no program starts empty, none looks for its sequence, the host
never waits. Only the last key block of a sequence is masked. No atomics: results are bitwise reproducible, and those of
a sequence do not depend on its batch mates or on where in the pack it lies.
Any length works, any number of sequences, empty ones too. Knows nothing of models or batches.

Flash attention: Dao 2023, arXiv:2307.08691; rotary positions: Su et al. 2021, arXiv:2104.09864.

T tokens (packed), N heads, H head width, B sequences
"""

# pyright: reportIndexIssue=false, reportMissingImports=false

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Queries and keys a step of a kernel takes, its warps, the depth of its pipeline, a cap on registers a thread."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 2
    maxnreg: int | None = None

    def launch(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.maxnreg}


class Tuning(NamedTuple):
    """One head width: forward, dq, and dk and dv. dq "split": its own kernel; "serial", "atomic": within dkdv."""

    forward: Config
    dq: Config
    dkdv: Config
    mode: str = "split"


_TUNING = {
    16: Tuning(Config(64, 128, 4), Config(64, 64, 4), Config(64, 64, 4)),
    32: Tuning(Config(64, 128, 4), Config(64, 64, 4), Config(64, 64, 4)),
    64: Tuning(Config(128, 64, 8), Config(64, 64, 4), Config(64, 64, 4)),
    128: Tuning(Config(128, 64, 8), Config(64, 64, 8), Config(64, 64, 8)),
}


def tuning(head_dim: int) -> Tuning:
    """Fixed, so that restarts are quick and results repeat; measured by benchmarks/attention_gpu.py."""
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"head width {head_dim}: the Triton kernels take multiples of 8 up to 128")
    return _TUNING[max(16, triton.next_power_of_2(head_dim))]


class Tiles(NamedTuple):
    """The work lists of the three kernels (`tile_table`), for one batch and one head width."""

    forward: Tensor
    dq: Tensor
    dkdv: Tensor


def make_tiles(cu_seqlens: Tensor, num_tokens: int, head_dim: int) -> Tiles:
    """Once a batch, for all layers; on the device or, in the loader, on the host."""
    tuned = tuning(head_dim)
    keys = tuned.dkdv.block_n if tuned.mode != "serial" else num_tokens
    tables = {b: tile_table(cu_seqlens, num_tokens, b) for b in (tuned.forward.block_m, tuned.dq.block_m, keys)}
    return Tiles(tables[tuned.forward.block_m], tables[tuned.dq.block_m], tables[keys])


def tile_table(cu_seqlens: Tensor, num_tokens: int, block: int) -> Tensor:
    """Cut every sequence into tiles of `block` tokens: (num_tokens // block + B, 3) int32, longest sequence first.

    A row is the first token of the tile's sequence, the sequence's length, and the tile's first token counted from the
    sequence's; the rows that are too many have tiles beyond the length. Nothing waits for the device.
    """
    lengths, order = (cu_seqlens[1:] - cu_seqlens[:-1]).sort(descending=True, stable=True)
    starts = cu_seqlens[:-1][order]
    counts = (lengths + (block - 1)) // block
    ends = counts.cumsum(0)
    tile = torch.arange(num_tokens // block + len(lengths), device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tile, right=True).clamp_(max=len(lengths) - 1)
    first = (tile - (ends - counts)[sequence]) * block
    return torch.stack((starts[sequence], lengths[sequence], first), dim=1).to(torch.int32)


# --------------------------------------------------------------------------------------------------------- kernels
# Strides, N and H are constants, so that the compiler sees how far every row is aligned. HP: H padded to a power of 2.


# fmt: off
@triton.constexpr_function
def _half(block_n):
    """The narrower block for a short rest of a sequence; below 64 keys the tensor cores take slower instructions."""
    return block_n // 2 if block_n >= 128 else 0


@triton.jit
def _load(base, rows, length, STRIDE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, CHECK: tl.constexpr):
    """(rows, HP) of a (tokens, H) matrix; columns from H on, and with CHECK rows from `length` on, read as 0."""
    cols = tl.arange(0, HP)
    pointers = base + rows[:, None] * STRIDE + cols[None, :]
    if CHECK and HP > H:
        tile = tl.load(pointers, mask=(rows[:, None] < length) & (cols[None, :] < H), other=0.0)
    elif CHECK:
        tile = tl.load(pointers, mask=rows[:, None] < length, other=0.0)
    elif HP > H:
        tile = tl.load(pointers, mask=cols[None, :] < H, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def _store(base, rows, length, tile, STRIDE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr):
    cols = tl.arange(0, HP)
    mask = (rows[:, None] < length) & (cols[None, :] < H)
    tl.store(base + rows[:, None] * STRIDE + cols[None, :], tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _unrotate(x, COS, SIN, rows, length, H: tl.constexpr, HP: tl.constexpr):
    """Turn fp32 rows back: (x₁, x₂) → (x₁ cos + x₂ sin, x₂ cos − x₁ sin).

    The halves change places in a product with a signed permutation, exact for the 16 bits that two bf16 hold: no
    other way to move columns suits every register layout and every H.
    """
    HALF: tl.constexpr = H // 2
    i = tl.arange(0, HP)[:, None]
    j = tl.arange(0, HP)[None, :]
    swap = tl.where(i == j + HALF, 1.0, tl.where(j == i + HALF, -1.0, 0.0)).to(tl.bfloat16)
    high = x.to(tl.bfloat16)
    low = (x - high.to(tl.float32)).to(tl.bfloat16)
    swapped = tl.dot(low, swap, tl.dot(high, swap))
    angles = rows[:, None] * HALF + j % HALF
    mask = (rows[:, None] < length) & (j < H)
    return x * tl.load(COS + angles, mask=mask, other=0.0) + swapped * tl.load(SIN + angles, mask=mask, other=0.0)


@triton.jit
def _rotate_kernel(
    QKV, COS, SIN, OUT, num_rows, N: tl.constexpr, H: tl.constexpr, HALF_P: tl.constexpr, ROWS: tl.constexpr,
):
    """q and k of every token and head, row by row: (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin)."""
    HALF: tl.constexpr = H // 2
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    cols = tl.arange(0, HALF_P)[None, :]
    mask = (row < num_rows) & (cols < HALF)
    token = row // (2 * N)
    source = QKV + (row // 2) * (3 * H) + (row % 2) * H + cols
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(COS + token * HALF + cols, mask=mask, other=0.0)
    sin = tl.load(SIN + token * HALF + cols, mask=mask, other=0.0)
    target = OUT + row * H + cols
    tl.store(target, (first * cos - second * sin).to(OUT.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (second * cos + first * sin).to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _forward_step(
    acc, top, total, q, K, V, first, length, scale_log2, QK_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr,
):
    """One block of keys. top: running maximum of the scores in log2 units; total: running sum of the weights."""
    rows = first + tl.arange(0, BLOCK_N)
    k = _load(K, rows, length, QK_TOKEN, H, HP, LAST)
    scores = tl.dot(q, tl.trans(k))
    if LAST:
        scores = tl.where(rows[None, :] < length, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    v = _load(V, rows, length, V_TOKEN, H, HP, LAST)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_top, total


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    Q, K, V, OUT, LSE, TILES, num_tokens, scale_log2, QK_TOKEN: tl.constexpr, QK_HEAD: tl.constexpr,
    V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    head = tl.program_id(0) % N
    entry = TILES + (tl.program_id(0) // N) * 3
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    if first >= length:
        return
    K += start * QK_TOKEN + head * QK_HEAD
    V += start * V_TOKEN + head * V_HEAD
    queries = first + tl.arange(0, BLOCK_M)
    q = _load(Q + start * QK_TOKEN + head * QK_HEAD, queries, length, QK_TOKEN, H, HP, True)
    acc = tl.zeros([BLOCK_M, HP], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    HALF: tl.constexpr = _half(BLOCK_N)
    full = length // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        acc, top, total = _forward_step(
            acc, top, total, q, K, V, n, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, False
        )
    if length - full > HALF:
        acc, top, total = _forward_step(
            acc, top, total, q, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, True
        )
    elif HALF > 0 and length > full:
        acc, top, total = _forward_step(
            acc, top, total, q, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, HALF, True
        )
    _store(OUT + (start * N + head) * H, queries, length, acc / total[:, None], N * H, H, HP)
    tl.store(LSE + head * num_tokens + start + queries, top + tl.log2(total), mask=queries < length)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, K, V, first, length, scale_log2, QK_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr,
):
    rows = first + tl.arange(0, BLOCK_N)
    k = _load(K, rows, length, QK_TOKEN, H, HP, LAST)
    v = _load(V, rows, length, V_TOKEN, H, HP, LAST)
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
    if LAST:
        weights = tl.where(rows[None, :] < length, weights, 0.0)
    dscores = weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["num_tokens"])
def _dq_kernel(
    Q, K, V, OUT, DOUT, LSE, STATS, DQ, COS, SIN, TILES, num_tokens, scale, scale_log2, QK_TOKEN: tl.constexpr,
    QK_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROTARY: tl.constexpr,
):
    """dq of one tile of queries; and STATS (N, T, 2), lse and delta = rowsum(dout · out), for `_dkdv_kernel`."""
    head = tl.program_id(0) % N
    entry = TILES + (tl.program_id(0) // N) * 3
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    if first >= length:
        return
    K += start * QK_TOKEN + head * QK_HEAD
    V += start * V_TOKEN + head * V_HEAD
    queries = first + tl.arange(0, BLOCK_M)
    real = queries < length
    q = _load(Q + start * QK_TOKEN + head * QK_HEAD, queries, length, QK_TOKEN, H, HP, True)
    out = _load(OUT + (start * N + head) * H, queries, length, N * H, H, HP, True)
    dout = _load(DOUT + (start * N + head) * H, queries, length, N * H, H, HP, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = head * num_tokens + start + queries
    lse = tl.load(LSE + row, mask=real, other=0.0)
    tl.store(STATS + row * 2, lse, mask=real)
    tl.store(STATS + row * 2 + 1, delta, mask=real)
    dq = tl.zeros([BLOCK_M, HP], tl.float32)
    HALF: tl.constexpr = _half(BLOCK_N)
    full = length // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        dq = _dq_step(dq, q, dout, lse, delta, K, V, n, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, False)
    if length - full > HALF:
        dq = _dq_step(dq, q, dout, lse, delta, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, True)
    elif HALF > 0 and length > full:
        dq = _dq_step(
            dq, q, dout, lse, delta, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, HALF, True
        )
    dq *= scale
    if ROTARY:
        dq = _unrotate(dq, COS + start * (H // 2), SIN + start * (H // 2), queries, length, H, HP)
    _store(DQ + (start * N + head) * 3 * H, queries, length, dq, 3 * N * H, H, HP)


@triton.jit
def _load_stats(STATS, queries, length, BLOCK_M: tl.constexpr, WARPS: tl.constexpr):
    """lse and delta of a block of queries, 0 past the end.

    A load of fewer elements than threads would be repeated by every thread for each column it holds (34 loads a step
    instead of one), hence both in one load, and twice for many warps.
    """
    if 2 * BLOCK_M >= 32 * WARPS:
        pairs = STATS + queries[:, None] * 2 + tl.arange(0, 2)[None, :]
        lse, delta = tl.split(tl.load(pairs, mask=queries[:, None] < length, other=0.0))
    else:
        pairs = STATS + queries[:, None] * 2 + tl.arange(0, 4)[None, :] % 2
        twice = tl.load(pairs, mask=queries[:, None] < length, other=0.0)
        lses, deltas = tl.split(tl.reshape(twice, [BLOCK_M, 2, 2]))
        lse, _ = tl.split(lses)
        delta, _ = tl.split(deltas)
    return lse, delta


@triton.jit
def _key_block(
    Q, K, V, DOUT, STATS, SUM, DK, COS, SIN, first, length, scale, scale_log2, QK_TOKEN: tl.constexpr,
    V_TOKEN: tl.constexpr, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ROTARY: tl.constexpr, MODE: tl.constexpr, WARPS: tl.constexpr, LAST: tl.constexpr,
):
    """dk and dv of one block of keys; scores stand transposed, so that they enter the products from registers.

    MODE "serial" and "atomic" also add this block's share of dq to SUM (tokens, HP) fp32.
    """
    keys = first + tl.arange(0, BLOCK_N)
    k = _load(K, keys, length, QK_TOKEN, H, HP, LAST)
    v = _load(V, keys, length, V_TOKEN, H, HP, LAST)
    dk = tl.zeros([BLOCK_N, HP], tl.float32)
    dv = tl.zeros([BLOCK_N, HP], tl.float32)
    for m in range(0, length, BLOCK_M):
        queries = m + tl.arange(0, BLOCK_M)
        sums = SUM + queries[:, None] * HP + tl.arange(0, HP)[None, :]
        if MODE == "serial":  # asked for early, needed late
            before = tl.load(sums, mask=(queries[:, None] < length) & (first > 0), other=0.0)
        q = _load(Q, queries, length, QK_TOKEN, H, HP, True)
        dout = _load(DOUT, queries, length, N * H, H, HP, True)
        lse, delta = _load_stats(STATS, queries, length, BLOCK_M, WARPS)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
        if LAST:
            weights = tl.where(keys[:, None] < length, weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv)
        dscores = (weights * (tl.dot(v, tl.trans(dout)) - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk)
        if MODE == "serial":
            tl.store(sums, before + tl.dot(tl.trans(dscores), k), mask=queries[:, None] < length)
        if MODE == "atomic":
            tl.atomic_add(sums, tl.dot(tl.trans(dscores), k), mask=queries[:, None] < length, sem="relaxed")
    _store(DK + H, keys, length, dv, 3 * N * H, H, HP)  # first: what follows needs its registers
    dk *= scale
    if ROTARY:
        dk = _unrotate(dk, COS, SIN, keys, length, H, HP)
    _store(DK, keys, length, dk, 3 * N * H, H, HP)


@triton.jit(do_not_specialize=["num_tokens"])
def _dkdv_kernel(
    Q, K, V, DOUT, STATS, SUM, DQKV, COS, SIN, TILES, num_tokens, scale, scale_log2, QK_TOKEN: tl.constexpr,
    QK_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr, N: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROTARY: tl.constexpr, MODE: tl.constexpr,
    WARPS: tl.constexpr,
):
    """MODE "split", "atomic": one program a tile of keys; "serial": one a sequence, dq written here too."""
    head = tl.program_id(0) % N
    entry = TILES + (tl.program_id(0) // N) * 3
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    if first >= length:
        return
    Q += start * QK_TOKEN + head * QK_HEAD
    K += start * QK_TOKEN + head * QK_HEAD
    V += start * V_TOKEN + head * V_HEAD
    DOUT += (start * N + head) * H
    DQKV += (start * N + head) * 3 * H
    STATS += (head * num_tokens + start) * 2
    SUM += (head * num_tokens + start) * HP
    COS += start * (H // 2)
    SIN += start * (H // 2)
    HALF: tl.constexpr = _half(BLOCK_N)
    if MODE == "serial":
        for n in range(0, length // BLOCK_N * BLOCK_N, BLOCK_N):
            _key_block(
                Q, K, V, DOUT, STATS, SUM, DQKV + H, COS, SIN, n, length, scale, scale_log2, QK_TOKEN, V_TOKEN, N, H,
                HP, BLOCK_M, BLOCK_N, ROTARY, MODE, WARPS, False,
            )
            tl.debug_barrier()
        first = length // BLOCK_N * BLOCK_N
    if length - first >= BLOCK_N and MODE != "serial":
        _key_block(
            Q, K, V, DOUT, STATS, SUM, DQKV + H, COS, SIN, first, length, scale, scale_log2, QK_TOKEN, V_TOKEN, N, H,
            HP, BLOCK_M, BLOCK_N, ROTARY, MODE, WARPS, False,
        )
    elif length - first > HALF:
        _key_block(
            Q, K, V, DOUT, STATS, SUM, DQKV + H, COS, SIN, first, length, scale, scale_log2, QK_TOKEN, V_TOKEN, N, H,
            HP, BLOCK_M, BLOCK_N, ROTARY, MODE, WARPS, True,
        )
    elif HALF > 0 and length > first:
        _key_block(
            Q, K, V, DOUT, STATS, SUM, DQKV + H, COS, SIN, first, length, scale, scale_log2, QK_TOKEN, V_TOKEN, N, H,
            HP, BLOCK_M, HALF, ROTARY, MODE, WARPS, True,
        )
    if MODE == "serial":
        tl.debug_barrier()
        for m in range(0, length, BLOCK_M):
            _finish_dq(SUM, DQKV, COS, SIN, m, length, scale, N, H, HP, BLOCK_M, ROTARY)


@triton.jit
def _finish_dq(
    SUM, DQ, COS, SIN, first, length, scale, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr,
):
    queries = first + tl.arange(0, BLOCK_M)
    dq = _load(SUM, queries, length, HP, HP, HP, True) * scale
    if ROTARY:
        dq = _unrotate(dq, COS, SIN, queries, length, H, HP)
    _store(DQ, queries, length, dq, 3 * N * H, H, HP)


@triton.jit(do_not_specialize=["num_tokens"])
def _finish_dq_kernel(
    SUM, DQKV, COS, SIN, num_tokens, scale, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr,
    ROTARY: tl.constexpr,
):
    head = tl.program_id(0) % N
    start = (tl.program_id(0) // N).to(tl.int64) * BLOCK_M
    _finish_dq(
        SUM + (head * num_tokens + start) * HP, DQKV + (start * N + head) * 3 * H, COS + start * (H // 2),
        SIN + start * (H // 2), 0, num_tokens - start, scale, N, H, HP, BLOCK_M, ROTARY,
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _stats_kernel(
    OUT, DOUT, LSE, STATS, num_tokens, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr,
):
    head = tl.program_id(0) % N
    start = (tl.program_id(0) // N).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    out = _load(OUT + (start * N + head) * H, rows, num_tokens - start, N * H, H, HP, True)
    dout = _load(DOUT + (start * N + head) * H, rows, num_tokens - start, N * H, H, HP, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    real = rows < num_tokens - start
    row = head * num_tokens + start + rows
    tl.store(STATS + row * 2, tl.load(LSE + row, mask=real), mask=real)
    tl.store(STATS + row * 2 + 1, delta, mask=real)


# fmt: on
# -------------------------------------------------------------------------------------------------------- launches


def rotate(qkv_TN3H: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated q and k: (T, N, 2, H)."""
    T, N, _, H = qkv_TN3H.shape
    qk = qkv_TN3H.new_empty(T, N, 2, H)
    half = triton.next_power_of_2(H // 2)
    rows = 2048 // half
    _rotate_kernel[(triton.cdiv(2 * T * N, rows),)](qkv_TN3H, cos, sin, qk, 2 * T * N, N, H, half, rows, num_warps=4)
    return qk


def _views(qkv_TN3H: Tensor, qk_TN2H: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    """q, k and v, and what the kernels take as constants: strides of q and k, of v, N, H, H padded."""
    N, _, H = qkv_TN3H.shape[1:]
    q, k = (qk_TN2H if qk_TN2H.numel() else qkv_TN3H).unbind(2)[:2]
    v = qkv_TN3H[:, :, 2]
    padded = max(16, triton.next_power_of_2(H))
    return (q, k, v), (q.stride(0), q.stride(1), v.stride(0), v.stride(1), N, H, padded)


def run_forward(qkv_TN3H: Tensor, qk_TN2H: Tensor, tiles: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """out (T, N, H) and lse (N, T), log2 of the sum of 2^(scores · log2 e / √H). tiles: of config.block_m tokens."""
    T, N, _, H = qkv_TN3H.shape
    (q, k, v), constants = _views(qkv_TN3H, qk_TN2H)
    out = qkv_TN3H.new_empty(T, N, H)
    lse = torch.empty(N, T, dtype=torch.float32, device=qkv_TN3H.device)
    sizes = (config.block_m, config.block_n)
    scale_log2 = H**-0.5 * math.log2(math.e)
    grid = (len(tiles) * N,)
    _forward_kernel[grid](q, k, v, out, lse, tiles, T, scale_log2, *constants, *sizes, **config.launch())
    return out, lse


def run_backward(
    qkv_TN3H: Tensor,
    qk_TN2H: Tensor,
    out_TNH: Tensor,
    lse_NT: Tensor,
    dout_TNH: Tensor,
    cos: Tensor,
    sin: Tensor,
    tiles_m: Tensor,
    tiles_n: Tensor,
    tuned: Tuning,
) -> Tensor:
    """dqkv (T, N, 3, H). tiles_m: of tuned.dq.block_m tokens; tiles_n: of tuned.dkdv.block_n, "serial": sequences."""
    T, N, _, H = qkv_TN3H.shape
    (q, k, v), constants = _views(qkv_TN3H, qk_TN2H)
    padded, rotary = constants[-1], qk_TN2H.numel() > 0
    scale, scale_log2 = H**-0.5, H**-0.5 * math.log2(math.e)
    dqkv = torch.empty_like(qkv_TN3H)
    stats = torch.empty(N, T, 2, dtype=torch.float32, device=lse_NT.device)
    total = stats
    if tuned.mode == "split":
        c = tuned.dq
        args = (q, k, v, out_TNH, dout_TNH, lse_NT, stats, dqkv, cos, sin, tiles_m, T, scale, scale_log2, *constants)
        _dq_kernel[(len(tiles_m) * N,)](*args, c.block_m, c.block_n, rotary, **c.launch())
    else:
        _stats_kernel[(triton.cdiv(T, 128) * N,)](out_TNH, dout_TNH, lse_NT, stats, T, N, H, padded, 128)
        new = torch.zeros if tuned.mode == "atomic" else torch.empty
        total = new(N, T, padded, dtype=torch.float32, device=lse_NT.device)
    c = tuned.dkdv
    args = (q, k, v, dout_TNH, stats, total, dqkv, cos, sin, tiles_n, T, scale, scale_log2, *constants)
    _dkdv_kernel[(len(tiles_n) * N,)](*args, c.block_m, c.block_n, rotary, tuned.mode, c.num_warps, **c.launch())
    if tuned.mode == "atomic":
        _finish_dq_kernel[(triton.cdiv(T, 64) * N,)](total, dqkv, cos, sin, T, scale, N, H, padded, 64, rotary)
    return dqkv


# -------------------------------------------------------------------------------------------------------------- op


@torch.library.custom_op("moltron::packed_attention", mutates_args=())
def _packed_attention(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, forward: Tensor, dq: Tensor, dkdv: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(qkv):
        qk = qkv.new_empty(0) if cos is None or sin is None else rotate(qkv, cos, sin)
        out, lse = run_forward(qkv, qk, forward, tuning(qkv.shape[-1]).forward)
    return out, lse, qk


@_packed_attention.register_fake
def _(qkv, cos, sin, forward, dq, dkdv):
    T, N, _, H = qkv.shape
    lse = qkv.new_empty(N, T, dtype=torch.float32)
    return qkv.new_empty(T, N, H), lse, qkv.new_empty(0) if cos is None else qkv.new_empty(T, N, 2, H)


@torch.library.custom_op("moltron::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    qkv: Tensor,
    qk: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    dq: Tensor,
    dkdv: Tensor,
) -> Tensor:
    cos, sin = (lse, lse) if cos is None or sin is None else (cos, sin)  # without rotation nothing reads them
    with torch.cuda.device_of(qkv):
        return run_backward(qkv, qk, out, lse, dout.contiguous(), cos, sin, dq, dkdv, tuning(qkv.shape[-1]))


@_packed_attention_backward.register_fake
def _(qkv, qk, out, lse, dout, cos, sin, dq, dkdv):
    return torch.empty_like(qkv)


def _save(ctx, inputs, output) -> None:
    qkv, cos, sin, _, dq, dkdv = inputs
    out, lse, qk = output
    ctx.mark_non_differentiable(lse, qk)
    ctx.save_for_backward(qkv, qk, out, lse, cos, sin, dq, dkdv)


def _backward(ctx, dout, *_):
    qkv, qk, out, lse, cos, sin, dq, dkdv = ctx.saved_tensors
    dqkv = torch.ops.moltron.packed_attention_backward(qkv, qk, out, lse, dout, cos, sin, dq, dkdv)
    return dqkv, None, None, None, None, None


_packed_attention.register_autograd(_backward, setup_context=_save)


def packed_attention(qkv_TN3H: Tensor, tiles: Tiles, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Softmax(q kᵀ / √H) v within each sequence, bidirectional; q and k are rotated first if `rotary` is given.

    qkv_TN3H: (T, N, 3, H) fp16 or bf16, as the projection wrote it. tiles: `make_tiles` of the batch. rotary: cosine
    and sine of every token, (T, H/2) or (T, 1, H/2) fp32, `positions.rotary_table`. Returns (T, N, H) in the dtype of
    qkv; its gradient is one (T, N, 3, H) tensor.
    """
    cos, sin = (x.flatten(1) for x in rotary) if rotary is not None else (None, None)
    return torch.ops.moltron.packed_attention(qkv_TN3H.contiguous(), cos, sin, *tiles)[0]
