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

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Config(NamedTuple):
    """Queries and keys a step of a kernel takes, its warps and the depth of its pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Tuning(NamedTuple):
    """One head width: forward, dq, and dk and dv. dq "split": its own kernel; "serial", "atomic": within dkdv."""

    forward: Config
    dq: Config
    dkdv: Config
    mode: str = "split"


_TUNING = {
    16: Tuning(Config(64, 128, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    32: Tuning(Config(64, 128, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    64: Tuning(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    128: Tuning(Config(64, 64, 4, 2), Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
}


def tuning(head_dim: int) -> Tuning:
    return _TUNING[max(16, triton.next_power_of_2(head_dim))]


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
    QKV, COS, SIN, OUT, num_rows, N: tl.constexpr, H: tl.constexpr, HALF_P: tl.constexpr, ROWS: tl.constexpr
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
    acc, top, total, q, K, V, first, length, scale_log2,
    QK_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BLOCK_N: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
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


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, LSE, TILES, num_tokens, scale_log2,
    QK_TOKEN: tl.constexpr, QK_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    full = length // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        acc, top, total = _forward_step(
            acc, top, total, q, K, V, n, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, False
        )
    if length - full > BLOCK_N // 2:
        acc, top, total = _forward_step(
            acc, top, total, q, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, True
        )
    elif length > full:
        acc, top, total = _forward_step(
            acc, top, total, q, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N // 2, True
        )
    _store(OUT + (start * N + head) * H, queries, length, acc / total[:, None], N * H, H, HP)
    tl.store(LSE + head * num_tokens + start + queries, top + tl.log2(total), mask=queries < length)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, K, V, first, length, scale_log2,
    QK_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BLOCK_N: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    rows = first + tl.arange(0, BLOCK_N)
    k = _load(K, rows, length, QK_TOKEN, H, HP, LAST)
    v = _load(V, rows, length, V_TOKEN, H, HP, LAST)
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
    if LAST:
        weights = tl.where(rows[None, :] < length, weights, 0.0)
    dscores = weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq)


@triton.jit
def _dq_kernel(
    Q, K, V, OUT, DOUT, LSE, DELTA, DQ, COS, SIN, TILES, num_tokens, scale, scale_log2,
    QK_TOKEN: tl.constexpr, QK_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries; also delta = rowsum(dout · out), which `_dkdv_kernel` reads."""
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
    tl.store(DELTA + head * num_tokens + start + queries, delta, mask=real)
    lse = tl.load(LSE + head * num_tokens + start + queries, mask=real, other=float("inf"))
    dq = tl.zeros([BLOCK_M, HP], tl.float32)
    full = length // BLOCK_N * BLOCK_N
    for n in range(0, full, BLOCK_N):
        dq = _dq_step(
            dq, q, dout, lse, delta, K, V, n, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, False
        )
    if length - full > BLOCK_N // 2:
        dq = _dq_step(
            dq, q, dout, lse, delta, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N, True
        )
    elif length > full:
        dq = _dq_step(
            dq, q, dout, lse, delta, K, V, full, length, scale_log2, QK_TOKEN, V_TOKEN, H, HP, BLOCK_N // 2, True
        )
    dq *= scale
    if ROTARY:
        dq = _unrotate(dq, COS + start * (H // 2), SIN + start * (H // 2), queries, length, H, HP)
    _store(DQ + (start * N + head) * 3 * H, queries, length, dq, 3 * N * H, H, HP)


@triton.jit
def _key_block(
    Q, K, V, DOUT, LSE, DELTA, SUM, DK, COS, SIN, first, length, scale, scale_log2,
    QK_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROTARY: tl.constexpr, MODE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
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
        real = queries < length
        q = _load(Q, queries, length, QK_TOKEN, H, HP, True)
        dout = _load(DOUT, queries, length, N * H, H, HP, True)
        lse = tl.load(LSE + queries, mask=real, other=float("inf"))
        delta = tl.load(DELTA + queries, mask=real, other=0.0)
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
        if LAST:
            weights = tl.where(keys[:, None] < length, weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv)
        dscores = (weights * (tl.dot(v, tl.trans(dout)) - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk)
        if MODE != "split":
            share = tl.dot(tl.trans(dscores), k)
            pointers = SUM + queries[:, None] * HP + tl.arange(0, HP)[None, :]
            if MODE == "atomic":
                tl.atomic_add(pointers, share, mask=real[:, None], sem="relaxed")
            else:
                share += tl.load(pointers, mask=real[:, None] & (first > 0), other=0.0)
                tl.store(pointers, share, mask=real[:, None])
    dk *= scale
    if ROTARY:
        dk = _unrotate(dk, COS, SIN, keys, length, H, HP)
    _store(DK, keys, length, dk, 3 * N * H, H, HP)
    _store(DK + H, keys, length, dv, 3 * N * H, H, HP)


@triton.jit
def _dkdv_kernel(
    Q, K, V, DOUT, LSE, DELTA, SUM, DQKV, COS, SIN, TILES, num_tokens, scale, scale_log2,
    QK_TOKEN: tl.constexpr, QK_HEAD: tl.constexpr, V_TOKEN: tl.constexpr, V_HEAD: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ROTARY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
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
    LSE += head * num_tokens + start
    DELTA += head * num_tokens + start
    SUM += (head * num_tokens + start) * HP
    COS += start * (H // 2)
    SIN += start * (H // 2)
    if MODE == "serial":
        for n in range(0, length // BLOCK_N * BLOCK_N, BLOCK_N):
            _key_block(
                Q, K, V, DOUT, LSE, DELTA, SUM, DQKV + H, COS, SIN, n, length, scale, scale_log2,
                QK_TOKEN, V_TOKEN, N, H, HP, BLOCK_M, BLOCK_N, ROTARY, MODE, False,
            )  # fmt: skip
            tl.debug_barrier()
        first = length // BLOCK_N * BLOCK_N
    if length - first >= BLOCK_N and MODE != "serial":
        _key_block(
            Q, K, V, DOUT, LSE, DELTA, SUM, DQKV + H, COS, SIN, first, length, scale, scale_log2,
            QK_TOKEN, V_TOKEN, N, H, HP, BLOCK_M, BLOCK_N, ROTARY, MODE, False,
        )  # fmt: skip
    elif length - first > BLOCK_N // 2:
        _key_block(
            Q, K, V, DOUT, LSE, DELTA, SUM, DQKV + H, COS, SIN, first, length, scale, scale_log2,
            QK_TOKEN, V_TOKEN, N, H, HP, BLOCK_M, BLOCK_N, ROTARY, MODE, True,
        )  # fmt: skip
    elif length > first:
        _key_block(
            Q, K, V, DOUT, LSE, DELTA, SUM, DQKV + H, COS, SIN, first, length, scale, scale_log2,
            QK_TOKEN, V_TOKEN, N, H, HP, BLOCK_M, BLOCK_N // 2, ROTARY, MODE, True,
        )  # fmt: skip
    if MODE == "serial":
        tl.debug_barrier()
        for m in range(0, length, BLOCK_M):
            _finish_dq(SUM, DQKV, COS, SIN, m, length, scale, N, H, HP, BLOCK_M, ROTARY)


@triton.jit
def _finish_dq(
    SUM, DQ, COS, SIN, first, length, scale,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    queries = first + tl.arange(0, BLOCK_M)
    dq = _load(SUM, queries, length, HP, HP, HP, True) * scale
    if ROTARY:
        dq = _unrotate(dq, COS, SIN, queries, length, H, HP)
    _store(DQ, queries, length, dq, 3 * N * H, H, HP)


@triton.jit
def _finish_dq_kernel(
    SUM, DQKV, COS, SIN, num_tokens, scale,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % N
    start = (tl.program_id(0) // N).to(tl.int64) * BLOCK_M
    _finish_dq(
        SUM + (head * num_tokens + start) * HP, DQKV + (start * N + head) * 3 * H, COS + start * (H // 2),
        SIN + start * (H // 2), 0, num_tokens - start, scale, N, H, HP, BLOCK_M, ROTARY,
    )  # fmt: skip


@triton.jit
def _delta_kernel(
    OUT, DOUT, DELTA, num_tokens, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, BLOCK_M: tl.constexpr
):
    head = tl.program_id(0) % N
    start = (tl.program_id(0) // N).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    out = _load(OUT + (start * N + head) * H, rows, num_tokens - start, N * H, H, HP, True)
    dout = _load(DOUT + (start * N + head) * H, rows, num_tokens - start, N * H, H, HP, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    tl.store(DELTA + head * num_tokens + start + rows, delta, mask=rows < num_tokens - start)


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
    _forward_kernel[(len(tiles) * N,)](
        q, k, v, out, lse, tiles, T, H**-0.5 * math.log2(math.e), *constants, config.block_m, config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
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
    delta = torch.empty_like(lse_NT)
    total = lse_NT
    if tuned.mode == "split":
        c = tuned.dq
        _dq_kernel[(len(tiles_m) * N,)](
            q, k, v, out_TNH, dout_TNH, lse_NT, delta, dqkv, cos, sin, tiles_m, T, scale, scale_log2, *constants,
            c.block_m, c.block_n, rotary, num_warps=c.num_warps, num_stages=c.num_stages,
        )  # fmt: skip
    else:
        _delta_kernel[(triton.cdiv(T, 128) * N,)](out_TNH, dout_TNH, delta, T, N, H, padded, 128)
        new = torch.zeros if tuned.mode == "atomic" else torch.empty
        total = new(N, T, padded, dtype=torch.float32, device=lse_NT.device)
    c = tuned.dkdv
    _dkdv_kernel[(len(tiles_n) * N,)](
        q, k, v, dout_TNH, lse_NT, delta, total, dqkv, cos, sin, tiles_n, T, scale, scale_log2, *constants,
        c.block_m, c.block_n, rotary, tuned.mode, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if tuned.mode == "atomic":
        _finish_dq_kernel[(triton.cdiv(T, 64) * N,)](total, dqkv, cos, sin, T, scale, N, H, padded, 64, rotary)
    return dqkv
