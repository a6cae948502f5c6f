"""Attention for packed sequences: the Triton kernels, one set for all its kinds. `triton_attention` launches them.

    CAUSAL    a query sees no later key: the blocks beyond the diagonal are skipped, only the diagonal one is masked
    CROSS     keys of another stream: OTHER, its cu_seqlens, says where the tile's sequence lies there, maybe empty
    RADIUS    ≥ 0: a bias from TABLE, by clamp(key − query, −RADIUS, RADIUS) + RADIUS, is added to the scores; forward
    ROTATED   q and k were rotated: the backward turns dq and dk back

Constants, so that each kind is compiled by itself and pays nothing for the others.
Knows nothing of tensors' owners, autograd or tuning.

N heads, H head width, HP: H padded to a power of 2. Q, K, V and their gradients are (tokens, N, H) with strides: QT, QN
from token to token and from head to head of Q; constants, so that the compiler sees how far every row is aligned.
OUT, DOUT are contiguous.
"""

# pyright: reportIndexIssue=false, reportMissingImports=false, reportArgumentType=false

import math

import triton
import triton.language as tl

from moltron.layers.layout import TILE

_BLOCK = tl.constexpr(TILE)  # queries and keys a step; below 64 keys the tensor cores take slower instructions
_LOG2E = tl.constexpr(math.log2(math.e))


# fmt: off
@triton.jit
def _find_tile(TILES, OTHER, N: tl.constexpr, CROSS: tl.constexpr):
    """Head; start, length and first token of a tile; start and length of the sequence in the stream it attends to.

    Heads of one tile run side by side, for they share the cache lines of its tokens.
    """
    entry = TILES + (tl.program_id(0) // N) * 4
    start, length, first = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    other_start, other_length = start, length
    if CROSS:
        bounds = OTHER + tl.load(entry + 3)
        begin = tl.load(bounds)
        other_start, other_length = begin.to(tl.int64), tl.load(bounds + 1) - begin
    return tl.program_id(0) % N, start, length, first, other_start, other_length


@triton.jit
def _is_short(num_queries, num_keys, ROTATED: tl.constexpr):
    """Of a molecule that is one tile in both streams: `dq_kernel` has all of its gradients. Models with rotations are
    of proteins, few of which are that short: what turns dk back would take registers of all."""
    if ROTATED:
        return False
    return (num_queries > 0) & (num_queries <= _BLOCK) & (num_keys <= _BLOCK)


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
def rotate_kernel(
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
def _visible(keys, queries, num_keys, CAUSAL: tl.constexpr):
    """Which scores of a masked block count. A key on or before the diagonal of a real query is real."""
    if CAUSAL:
        visible = keys <= queries
    else:
        visible = keys < num_keys
    return visible


@triton.jit
def _bias(TABLE, offset, RADIUS: tl.constexpr):
    """(queries, keys) of a block from one head's table; offset: from the first query to the first key.

    The block has at most 127 numbers, one for each distance: these are loaded, and each score picks its own through
    shared memory. Loads by score would come in another order than the scores lie in, and have to be turned around.
    """
    distances = offset - (_BLOCK - 1) + tl.arange(0, 2 * _BLOCK)
    values = tl.load(TABLE + (tl.minimum(tl.maximum(distances, -RADIUS), RADIUS) + RADIUS)) * _LOG2E
    index = tl.arange(0, _BLOCK)[None, :] - tl.arange(0, _BLOCK)[:, None] + (_BLOCK - 1)
    return tl.reshape(tl.gather(values, tl.reshape(index, [_BLOCK * _BLOCK]), 0), [_BLOCK, _BLOCK])


@triton.jit
def _forward_step(
    acc, top, total, q, first_query, K, V, TABLE, first, num_keys, scale_log2, KT: tl.constexpr, VT: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, RADIUS: tl.constexpr, CAUSAL: tl.constexpr, LAST: tl.constexpr,
):
    """One block of keys. top: running maximum of the scores in log2 units; total: running sum of the weights."""
    keys = first + tl.arange(0, _BLOCK)
    k = _load(K, keys, num_keys, KT, H, HP, LAST)
    v = _load(V, keys, num_keys, VT, H, HP, LAST)  # outside of the pipeline it is long on its way
    scores = tl.dot(q, tl.trans(k))
    if LAST:
        queries = first_query + tl.arange(0, _BLOCK)
        scores = tl.where(_visible(keys[None, :], queries[:, None], num_keys, CAUSAL), scores, float("-inf"))
    if RADIUS >= 0:
        scores = scores * scale_log2 + _bias(TABLE, first - first_query, RADIUS)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None])
    return acc, new_top, total


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    Q, K, V, TILES, OTHER, num_tokens, scale, TABLE, OUT, LSE,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, QT: tl.constexpr, QN: tl.constexpr, KT: tl.constexpr,
    KN: tl.constexpr, VT: tl.constexpr, VN: tl.constexpr, CAUSAL: tl.constexpr, CROSS: tl.constexpr,
    RADIUS: tl.constexpr,
):
    """One tile of queries. LSE (N, num_tokens): log2 of the sum of 2^(score · scale · log2 e) over the keys of each
    query; queries without keys get OUT 0."""
    head, start, num_queries, first, key_start, num_keys = _find_tile(TILES, OTHER, N, CROSS)
    if first >= num_queries:
        return
    Q += start * QT + head * QN
    K += key_start * KT + head * KN
    V += key_start * VT + head * VN
    if RADIUS >= 0:
        TABLE += head * (2 * RADIUS + 1)
    queries = first + tl.arange(0, _BLOCK)
    q = _load(Q, queries, num_queries, QT, H, HP, True)
    acc = tl.zeros([_BLOCK, HP], tl.float32)
    top = tl.full([_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([_BLOCK], tl.float32)
    scale_log2 = scale * _LOG2E
    full = first if CAUSAL else num_keys // _BLOCK * _BLOCK
    for n in range(0, full, _BLOCK):
        acc, top, total = _forward_step(
            acc, top, total, q, first, K, V, TABLE, n, num_keys, scale_log2, KT, VT, H, HP, RADIUS, CAUSAL, False,
        )
    if full < num_keys:
        acc, top, total = _forward_step(
            acc, top, total, q, first, K, V, TABLE, full, num_keys, scale_log2, KT, VT, H, HP, RADIUS, CAUSAL, True,
        )
    if CROSS:
        total = tl.where(total > 0, total, 1.0)
    _store(OUT + (start * N + head) * H, queries, num_queries, acc / total[:, None], N * H, H, HP)
    tl.store(LSE + head * num_tokens + start + queries, top + tl.log2(total), mask=queries < num_queries)


@triton.jit
def _dq_step(
    dq, q, first_query, dout, lse, delta, K, V, first, num_keys, scale_log2, KT: tl.constexpr, VT: tl.constexpr,
    H: tl.constexpr, HP: tl.constexpr, CAUSAL: tl.constexpr, LAST: tl.constexpr,
):
    keys = first + tl.arange(0, _BLOCK)
    k = _load(K, keys, num_keys, KT, H, HP, LAST)
    v = _load(V, keys, num_keys, VT, H, HP, LAST)
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * scale_log2 - lse[:, None])
    if LAST:
        queries = first_query + tl.arange(0, _BLOCK)
        weights = tl.where(_visible(keys[None, :], queries[:, None], num_keys, CAUSAL), weights, 0.0)
    dscores = weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])
    return tl.dot(dscores.to(k.dtype), k, dq)


@triton.jit
def _short_backward(
    q, dout, lse, delta, K, V, DK, DV, num_keys, scale, KT: tl.constexpr, VT: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, CAUSAL: tl.constexpr, DKT: tl.constexpr, DVT: tl.constexpr,
):
    """dq, not scaled yet; dk and dv are written. Scores are computed once for all three."""
    rows = tl.arange(0, _BLOCK)
    k = _load(K, rows, num_keys, KT, H, HP, True)
    v = _load(V, rows, num_keys, VT, H, HP, True)
    weights = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * _LOG2E) - lse[:, None])
    weights = tl.where(_visible(rows[None, :], rows[:, None], num_keys, CAUSAL), weights, 0.0)
    _store(DV, rows, num_keys, tl.dot(tl.trans(weights.to(dout.dtype)), dout), DVT, H, HP)
    dscores = (weights * (tl.dot(dout, tl.trans(v)) - delta[:, None])).to(q.dtype)
    _store(DK, rows, num_keys, tl.dot(tl.trans(dscores), q) * scale, DKT, H, HP)
    return tl.dot(dscores, k)


@triton.jit(do_not_specialize=["num_tokens"])
def dq_kernel(
    Q, K, V, TILES, OTHER, num_tokens, scale, COS, SIN, DOUT, STATS, DQ, DK, DV, OUT, LSE,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, QT: tl.constexpr, QN: tl.constexpr, KT: tl.constexpr,
    KN: tl.constexpr, VT: tl.constexpr, VN: tl.constexpr, CAUSAL: tl.constexpr, CROSS: tl.constexpr,
    ROTATED: tl.constexpr, DQT: tl.constexpr, DQN: tl.constexpr, DKT: tl.constexpr, DKN: tl.constexpr,
    DVT: tl.constexpr, DVN: tl.constexpr,
):
    """dq of one tile of queries; and STATS (N, num_tokens, 2), lse and rowsum(dout · out), for `dkdv_kernel`; of a
    short sequence dk and dv instead."""
    head, start, num_queries, first, key_start, num_keys = _find_tile(TILES, OTHER, N, CROSS)
    if first >= num_queries:
        return
    Q += start * QT + head * QN
    K += key_start * KT + head * KN
    V += key_start * VT + head * VN
    queries = first + tl.arange(0, _BLOCK)
    real = queries < num_queries
    q = _load(Q, queries, num_queries, QT, H, HP, True)
    out = _load(OUT + (start * N + head) * H, queries, num_queries, N * H, H, HP, True)
    dout = _load(DOUT + (start * N + head) * H, queries, num_queries, N * H, H, HP, True)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    row = head * num_tokens + start + queries
    lse = tl.load(LSE + row, mask=real, other=0.0)
    if _is_short(num_queries, num_keys, ROTATED):
        DK += key_start * DKT + head * DKN
        DV += key_start * DVT + head * DVN
        dq = _short_backward(q, dout, lse, delta, K, V, DK, DV, num_keys, scale, KT, VT, H, HP, CAUSAL, DKT, DVT)
    else:
        tl.store(STATS + row * 2, lse, mask=real)
        tl.store(STATS + row * 2 + 1, delta, mask=real)
        dq = tl.zeros([_BLOCK, HP], tl.float32)
        scale_log2 = scale * _LOG2E
        full = first if CAUSAL else num_keys // _BLOCK * _BLOCK
        for n in range(0, full, _BLOCK):
            dq = _dq_step(dq, q, first, dout, lse, delta, K, V, n, num_keys, scale_log2, KT, VT, H, HP, CAUSAL, False)
        if full < num_keys:
            dq = _dq_step(dq, q, first, dout, lse, delta, K, V, full, num_keys, scale_log2, KT, VT, H, HP, CAUSAL, True)
    dq *= scale
    if ROTATED:
        dq = _unrotate(dq, COS + start * (H // 2), SIN + start * (H // 2), queries, num_queries, H, HP)
    _store(DQ + start * DQT + head * DQN, queries, num_queries, dq, DQT, H, HP)


@triton.jit
def _dkdv_step(
    dk, dv, k, v, first_key, num_keys, Q, DOUT, STATS, first, num_queries, scale_log2, QT: tl.constexpr,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, CAUSAL: tl.constexpr, LAST: tl.constexpr,
):
    """Scores stand transposed (keys, queries), so that they enter the products for dk and dv from registers."""
    keys = first_key + tl.arange(0, _BLOCK)
    queries = first + tl.arange(0, _BLOCK)
    q = _load(Q, queries, num_queries, QT, H, HP, True)
    dout = _load(DOUT, queries, num_queries, N * H, H, HP, True)
    # Both in one load: with fewer elements than threads, each thread would load again for each column it holds.
    pairs = STATS + queries[:, None] * 2 + tl.arange(0, 2)[None, :]
    lse, delta = tl.split(tl.load(pairs, mask=queries[:, None] < num_queries, other=0.0))
    weights = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
    if CAUSAL:
        if first == first_key:  # a step of its own for this block took twice the shared memory and more registers
            weights = tl.where(_visible(keys[:, None], queries[None, :], num_keys, CAUSAL), weights, 0.0)
    elif LAST:
        weights = tl.where(_visible(keys[:, None], queries[None, :], num_keys, CAUSAL), weights, 0.0)
    dv = tl.dot(weights.to(dout.dtype), dout, dv)
    dscores = (weights * (tl.dot(v, tl.trans(dout)) - delta[None, :])).to(q.dtype)
    return tl.dot(dscores, q, dk), dv


@triton.jit
def _dkdv_tile(
    Q, K, V, DOUT, STATS, DK, DV, COS, SIN, first, num_keys, num_queries, scale, N: tl.constexpr, H: tl.constexpr,
    HP: tl.constexpr, QT: tl.constexpr, KT: tl.constexpr, VT: tl.constexpr, CAUSAL: tl.constexpr,
    ROTATED: tl.constexpr, DKT: tl.constexpr, DVT: tl.constexpr, LAST: tl.constexpr,
):
    keys = first + tl.arange(0, _BLOCK)
    k = _load(K, keys, num_keys, KT, H, HP, LAST)
    v = _load(V, keys, num_keys, VT, H, HP, LAST)
    dk = tl.zeros([_BLOCK, HP], tl.float32)
    dv = tl.zeros([_BLOCK, HP], tl.float32)
    scale_log2 = scale * _LOG2E
    for m in range(first if CAUSAL else 0, num_queries, _BLOCK):
        dk, dv = _dkdv_step(
            dk, dv, k, v, first, num_keys, Q, DOUT, STATS, m, num_queries, scale_log2, QT, N, H, HP, CAUSAL, LAST,
        )
    _store(DV, keys, num_keys, dv, DVT, H, HP)  # first: what follows needs its registers
    dk *= scale
    if ROTATED:
        dk = _unrotate(dk, COS, SIN, keys, num_keys, H, HP)
    _store(DK, keys, num_keys, dk, DKT, H, HP)


@triton.jit(do_not_specialize=["num_tokens"])
def dkdv_kernel(
    Q, K, V, TILES, OTHER, num_tokens, scale, COS, SIN, DOUT, STATS, DK, DV,
    N: tl.constexpr, H: tl.constexpr, HP: tl.constexpr, QT: tl.constexpr, QN: tl.constexpr, KT: tl.constexpr,
    KN: tl.constexpr, VT: tl.constexpr, VN: tl.constexpr, CAUSAL: tl.constexpr, CROSS: tl.constexpr,
    ROTATED: tl.constexpr, DKT: tl.constexpr, DKN: tl.constexpr, DVT: tl.constexpr, DVN: tl.constexpr,
):
    """dk and dv of one tile of keys: TILES are those of the keys, OTHER and num_tokens the queries'."""
    head, start, num_keys, first, query_start, num_queries = _find_tile(TILES, OTHER, N, CROSS)
    if (first >= num_keys) | _is_short(num_queries, num_keys, ROTATED):
        return
    Q += query_start * QT + head * QN
    K += start * KT + head * KN
    V += start * VT + head * VN
    DOUT += (query_start * N + head) * H
    STATS += (head * num_tokens + query_start) * 2
    DK += start * DKT + head * DKN
    DV += start * DVT + head * DVN
    if ROTATED:
        COS += start * (H // 2)
        SIN += start * (H // 2)
    if not CAUSAL:  # there the diagonal's mask hides what lies beyond the last key  # noqa: SIM102 (known early)
        if first + _BLOCK <= num_keys:
            _dkdv_tile(
                Q, K, V, DOUT, STATS, DK, DV, COS, SIN, first, num_keys, num_queries, scale, N, H, HP, QT, KT, VT,
                CAUSAL, ROTATED, DKT, DVT, False,
            )
            return
    _dkdv_tile(
        Q, K, V, DOUT, STATS, DK, DV, COS, SIN, first, num_keys, num_queries, scale, N, H, HP, QT, KT, VT, CAUSAL,
        ROTATED, DKT, DVT, True,
    )
