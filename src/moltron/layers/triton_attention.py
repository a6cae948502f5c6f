"""Attention for short, bidirectional, packed sequences on CUDA: Triton kernels behind one custom op.

    qkv ──rotate──> qk ──forward──> out, lse        one program: one tile of one sequence, one head
                     ├──dq──> dq, stats             one program: a tile of queries, over all keys of its sequence
                     └──dkdv──> dk, dv              one program: a tile of keys, over all queries

Protein sequences are short (median 270), so the work is a list of tiles of whole sequences, the longest first
(`layout.tile_table`), made once a batch for all layers and kernels; only the last block of a sequence is masked. dq, dk
and dv are written once, in the layout of qkv, the rotation undone on the way. A kernel for dq alone computes the scores
once more, and still was faster on an H100 than to add dq up with atomics or in one program a sequence. So results are
bitwise reproducible, and those of a sequence depend neither on its batch mates nor on where in the pack it lies. Any
length works, any number of sequences, empty ones too.
Knows nothing of models or batches.

Flash attention: Dao 2023, arXiv:2307.08691; rotary positions: Su et al. 2021, arXiv:2104.09864.

T tokens (packed), N heads, H head width
"""

# pyright: reportIndexIssue=false, reportMissingImports=false, reportArgumentType=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from moltron.layers.layout import TILE
from moltron.layers.positions import Rotary

_BLOCK = tl.constexpr(TILE)  # queries and keys a step; below 64 keys the tensor cores take slower instructions
_LOG2E = tl.constexpr(math.log2(math.e))

# Up to this head width: depth of the pipeline and cap on registers a thread. Fixed, so that restarts are quick and
# results repeat; the fastest of five to seven each on an H100.
_FORWARD, _DQ, _DKDV = range(3)
_TUNING = {
    16: ((3, None), (3, None), (2, 128)),
    24: ((3, None), (3, None), (3, 168)),
    32: ((3, None), (3, None), (2, 128)),
    64: ((3, None), (3, None), (2, 168)),
    128: ((2, None), (2, None), (2, None)),
}


# --------------------------------------------------------------------------------------------------------- kernels
# Strides, N and H are constants, so that the compiler sees how far every row is aligned. HP: H padded to a power of 2.
# QK (T, N, PARTS, H) holds q and k of every head: PARTS is 2 for the rotated copies, 3 where it is qkv itself.


# fmt: off
@triton.jit
def _find_tile(TILES, N: tl.constexpr):
    """Heads of one tile run side by side, for they share the cache lines of its tokens."""
    entry = TILES + (tl.program_id(0) // N) * 3
    return tl.program_id(0) % N, tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)


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
    acc, top, total, q, K, V, first, length, scale_log2, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    PARTS: tl.constexpr, LAST: tl.constexpr,
):
    """One block of keys. top: running maximum of the scores in log2 units; total: running sum of the weights."""
    keys = first + tl.arange(0, _BLOCK)
    k = _load(K, keys, length, PARTS * N * H, H, HP, LAST)
    scores = tl.dot(q, tl.trans(k))
    if LAST:
        scores = tl.where(keys[None, :] < length, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    v = _load(V, keys, length, 3 * N * H, H, HP, LAST)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_top, total


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    QK, QKV, TILES, num_tokens, scale, OUT, LSE, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    PARTS: tl.constexpr,
):
    """LSE (N, T): log2 of the sum of 2^(score · scale · log2 e) over the keys of each query."""
    head, start, length, first = _find_tile(TILES, N)
    if first >= length:
        return
    Q = QK + (start * N + head) * PARTS * H
    V = QKV + (start * N + head) * 3 * H + 2 * H
    queries = first + tl.arange(0, _BLOCK)
    q = _load(Q, queries, length, PARTS * N * H, H, HP, True)
    acc = tl.zeros([_BLOCK, HP], tl.float32)
    top = tl.full([_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([_BLOCK], tl.float32)
    scale_log2 = scale * _LOG2E
    full = length // _BLOCK * _BLOCK
    for n in range(0, full, _BLOCK):
        acc, top, total = _forward_step(acc, top, total, q, Q + H, V, n, length, scale_log2, N, H, HP, PARTS, False)
    if full < length:
        acc, top, total = _forward_step(acc, top, total, q, Q + H, V, full, length, scale_log2, N, H, HP, PARTS, True)
    _store(OUT + (start * N + head) * H, queries, length, acc / total[:, None], N * H, H, HP)
    tl.store(LSE + head * num_tokens + start + queries, top + tl.log2(total), mask=queries < length)


@triton.jit
def _dq_step(
    dq, q, dout, lse, delta, K, V, first, length, scale_log2, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    PARTS: tl.constexpr, LAST: tl.constexpr,
):
    keys = first + tl.arange(0, _BLOCK)
    k = _load(K, keys, length, PARTS * N * H, H, HP, LAST)
    v = _load(V, keys, length, 3 * N * H, H, HP, LAST)
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
    if LAST:
        weights = tl.where(keys[None, :] < length, weights, 0.0)
    dscores = weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["num_tokens"])
def _dq_kernel(
    QK, QKV, TILES, num_tokens, scale, DOUT, STATS, DQKV, COS, SIN, OUT, LSE, N: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, PARTS: tl.constexpr,
):
    """dq of one tile of queries; and STATS (N, T, 2), lse and delta = rowsum(dout · out), for `_dkdv_kernel`."""
    head, start, length, first = _find_tile(TILES, N)
    if first >= length:
        return
    Q = QK + (start * N + head) * PARTS * H
    V = QKV + (start * N + head) * 3 * H + 2 * H
    queries = first + tl.arange(0, _BLOCK)
    real = queries < length
    q = _load(Q, queries, length, PARTS * N * H, H, HP, True)
    out = _load(OUT + (start * N + head) * H, queries, length, N * H, H, HP, True)
    dout = _load(DOUT + (start * N + head) * H, queries, length, N * H, H, HP, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = head * num_tokens + start + queries
    lse = tl.load(LSE + row, mask=real, other=0.0)
    tl.store(STATS + row * 2, lse, mask=real)
    tl.store(STATS + row * 2 + 1, delta, mask=real)
    dq = tl.zeros([_BLOCK, HP], tl.float32)
    scale_log2 = scale * _LOG2E
    full = length // _BLOCK * _BLOCK
    for n in range(0, full, _BLOCK):
        dq = _dq_step(dq, q, dout, lse, delta, Q + H, V, n, length, scale_log2, N, H, HP, PARTS, False)
    if full < length:
        dq = _dq_step(dq, q, dout, lse, delta, Q + H, V, full, length, scale_log2, N, H, HP, PARTS, True)
    dq *= scale
    if PARTS == 2:
        dq = _unrotate(dq, COS + start * (H // 2), SIN + start * (H // 2), queries, length, H, HP)
    _store(DQKV + (start * N + head) * 3 * H, queries, length, dq, 3 * N * H, H, HP)


@triton.jit
def _dkdv_tile(
    Q, V, DOUT, STATS, DQKV, COS, SIN, first, length, scale, N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    PARTS: tl.constexpr, LAST: tl.constexpr,
):
    """Scores stand transposed (keys, queries), so that they enter the products for dk and dv from registers."""
    keys = first + tl.arange(0, _BLOCK)
    k = _load(Q + H, keys, length, PARTS * N * H, H, HP, LAST)
    v = _load(V, keys, length, 3 * N * H, H, HP, LAST)
    dk = tl.zeros([_BLOCK, HP], tl.float32)
    dv = tl.zeros([_BLOCK, HP], tl.float32)
    scale_log2 = scale * _LOG2E
    for m in range(0, length, _BLOCK):
        queries = m + tl.arange(0, _BLOCK)
        q = _load(Q, queries, length, PARTS * N * H, H, HP, True)
        dout = _load(DOUT, queries, length, N * H, H, HP, True)
        # Both in one load: with fewer elements than threads, each thread would load again for each column it holds.
        pairs = STATS + queries[:, None] * 2 + tl.arange(0, 2)[None, :]
        lse, delta = tl.split(tl.load(pairs, mask=queries[:, None] < length, other=0.0))
        weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
        if LAST:
            weights = tl.where(keys[:, None] < length, weights, 0.0)
        dv = tl.dot(weights.to(dout.dtype), dout, dv)
        dscores = (weights * (tl.dot(v, tl.trans(dout)) - delta[None, :])).to(q.dtype)
        dk = tl.dot(dscores, q, dk)
    _store(DQKV + 2 * H, keys, length, dv, 3 * N * H, H, HP)  # first: what follows needs its registers
    dk *= scale
    if PARTS == 2:
        dk = _unrotate(dk, COS, SIN, keys, length, H, HP)
    _store(DQKV + H, keys, length, dk, 3 * N * H, H, HP)


@triton.jit(do_not_specialize=["num_tokens"])
def _dkdv_kernel(
    QK, QKV, TILES, num_tokens, scale, DOUT, STATS, DQKV, COS, SIN, N: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, PARTS: tl.constexpr,
):
    head, start, length, first = _find_tile(TILES, N)
    if first >= length:
        return
    QK += (start * N + head) * PARTS * H
    QKV += (start * N + head) * 3 * H + 2 * H
    DOUT += (start * N + head) * H
    STATS += (head * num_tokens + start) * 2
    DQKV += (start * N + head) * 3 * H
    COS += start * (H // 2)
    SIN += start * (H // 2)
    if first + _BLOCK <= length:
        _dkdv_tile(QK, QKV, DOUT, STATS, DQKV, COS, SIN, first, length, scale, N, H, HP, PARTS, False)
    else:
        _dkdv_tile(QK, QKV, DOUT, STATS, DQKV, COS, SIN, first, length, scale, N, H, HP, PARTS, True)


# fmt: on
# -------------------------------------------------------------------------------------------------------- launches


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k, rotated: (T, N, 2, H)."""
    T, N, _, H = qkv.shape
    qk = qkv.new_empty(T, N, 2, H)
    half = triton.next_power_of_2(H // 2)
    rows = 2048 // half
    _rotate_kernel[(triton.cdiv(2 * T * N, rows),)](qkv, cos, sin, qk, 2 * T * N, N, H, half, rows)
    return qk


def _launch(kernel, which: int, qkv: Tensor, qk: Tensor, tiles: Tensor, *others: Tensor) -> None:
    """qk: without elements where there is no rotation."""
    T, N, _, H = qkv.shape
    qk = qk if qk.numel() else qkv
    stages, registers = _TUNING[min(width for width in _TUNING if width >= H)][which]
    constants = (N, H, max(16, triton.next_power_of_2(H)), qk.shape[2])
    settings = {"num_warps": 4, "num_stages": stages, "maxnreg": registers}
    kernel[(len(tiles) * N,)](qk, qkv, tiles, T, H**-0.5, *others, *constants, **settings)


# Operators cannot leave a tensor out of their results, so without rotation cos, sin and qk have no elements.


@torch.library.custom_op("moltron::packed_attention", mutates_args=())
def _attention(qkv: Tensor, tiles: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T, N, _, H = qkv.shape
    out, lse = qkv.new_empty(T, N, H), qkv.new_empty(N, T, dtype=torch.float32)
    with torch.cuda.device_of(qkv):
        qk = _rotate(qkv, cos, sin) if cos.numel() else qkv.new_empty(0)
        _launch(_forward_kernel, _FORWARD, qkv, qk, tiles, out, lse)
    return out, lse, qk


@_attention.register_fake
def _(qkv, tiles, cos, sin):
    T, N, _, H = qkv.shape
    qk = qkv.new_empty(T, N, 2, H) if cos.numel() else qkv.new_empty(0)
    return qkv.new_empty(T, N, H), qkv.new_empty(N, T, dtype=torch.float32), qk


@torch.library.custom_op("moltron::packed_attention_backward", mutates_args=())
def _attention_backward(
    qkv: Tensor, qk: Tensor, tiles: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> Tensor:
    dqkv, dout, stats = torch.empty_like(qkv), dout.contiguous(), lse.new_empty(*lse.shape, 2)
    with torch.cuda.device_of(qkv):
        _launch(_dq_kernel, _DQ, qkv, qk, tiles, dout, stats, dqkv, cos, sin, out, lse)
        _launch(_dkdv_kernel, _DKDV, qkv, qk, tiles, dout, stats, dqkv, cos, sin)
    return dqkv


@_attention_backward.register_fake
def _(qkv, qk, tiles, cos, sin, out, lse, dout):
    return torch.empty_like(qkv)


def _save(ctx, inputs, output) -> None:
    qkv, tiles, cos, sin = inputs
    out, lse, qk = output
    ctx.mark_non_differentiable(lse, qk)
    ctx.save_for_backward(qkv, qk, tiles, cos, sin, out, lse)


def _backward(ctx, dout, *_):
    dqkv = torch.ops.moltron.packed_attention_backward(*ctx.saved_tensors, dout)
    return dqkv, None, None, None


_attention.register_autograd(_backward, setup_context=_save)


def packed_attention(qkv_TN3H: Tensor, tiles: Tensor, rotary: Rotary) -> Tensor:
    """Softmax(q kᵀ / √H) v within each sequence, bidirectional; q and k are rotated first if `rotary` is not None.

    qkv_TN3H: (T, N, 3, H) fp16 or bf16, as the projection wrote it. tiles: `Layout.tiles`. rotary: cosine and sine of
    every token, (T, H/2) or (T, 1, H/2) fp32, `positions.rotary_table`. Returns (T, N, H) in the dtype of qkv; its
    gradient is one (T, N, 3, H) tensor. Raises ValueError for head widths but multiples of 8 up to 128.
    """
    head_dim = qkv_TN3H.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"head width {head_dim}: the Triton kernels take multiples of 8 up to 128")
    if rotary is None:
        cos = sin = qkv_TN3H.new_empty(0, dtype=torch.float32)
    else:
        cos, sin = (x.flatten(1) for x in rotary)
    return torch.ops.moltron.packed_attention(qkv_TN3H.contiguous(), tiles, cos, sin)[0]
