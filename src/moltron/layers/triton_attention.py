"""Attention for short packed sequences on CUDA: a differentiable custom op on the kernels of `triton_kernels`.

    qkv ──rotate──> qk                             only where positions are rotary
    q, k, v ──forward──> out, lse                  one program: a tile of queries of one sequence, one head
       ├──dq──> dq, stats                          one program: a tile of queries, over the keys of its sequence
       └──dkdv──> dk, dv                           one program: a tile of keys, over the queries of its sequence

Bidirectional or causal within one stream, or from one stream to another, sequence i to sequence i. Protein sequences
are short (median 270), so the work is a list of tiles of whole sequences, the longest first (`layout.tile_table`), made
once a batch for all layers and kernels; only the last block of a sequence, or the one on the diagonal, is masked. dq,
dk and dv are written once, in the layout of the projections that q, k and v are parts of, the rotation undone on the
way. A kernel for dq alone computes the scores once more, and still was faster on an H100 than to add dq up with atomics
or in one program a sequence. But where a sequence is one tile in both streams, as most molecules are, dk and dv come
with dq. So results are bitwise reproducible, and those of a sequence depend neither on its batch mates nor on where in
the pack it lies. Any length works, any number of sequences, empty ones too: without keys the output is 0.
Knows nothing of models or batches.

Flash attention: Dao 2023, arXiv:2307.08691; rotary positions: Su et al. 2021, arXiv:2104.09864.

T tokens of the queries' stream (packed), S of the keys', N heads, H head width, P parts of a projection
"""

# pyright: reportIndexIssue=false, reportMissingImports=false, reportArgumentType=false

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from moltron.layers.layout import Layout
from moltron.layers.positions import Rotary
from moltron.layers.triton_kernels import dkdv_kernel, dq_kernel, forward_kernel, rotate_kernel

# Up to this head width: depth of the pipeline and cap on registers a thread. Fixed, so that restarts are quick and
# results repeat; the fastest of five to seven each on an H100, of bidirectional self-attention.
_FORWARD, _DQ, _DKDV = range(3)
_TUNING = {
    16: ((3, None), (3, None), (2, 128)),
    24: ((3, None), (3, None), (3, 168)),
    32: ((3, None), (3, None), (2, 128)),
    64: ((3, None), (2, 128), (2, 168)),
    128: ((2, None), (2, None), (2, None)),
}


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """q and k, rotated: (T, N, 2, H)."""
    T, N, _, H = qkv.shape
    qk = qkv.new_empty(T, N, 2, H)
    half = triton.next_power_of_2(H // 2)
    rows = 2048 // half
    rotate_kernel[(triton.cdiv(2 * T * N, rows),)](qkv, cos, sin, qk, 2 * T * N, N, H, half, rows)
    return qk


def _launch(kernel, which: int, tiles: Tensor, other: Tensor | None, arguments: tuple, views: dict, **kind) -> None:
    """tiles: those that the programs write; other: `cu_seqlens` of the other stream, None for self-attention.

    views: the tensors that have strides, (tokens, N, H), by the kernels' names for these. The kernel gets q, k, v, the
    tiles, the number of query tokens, and `arguments`.
    """
    q = views["Q"]
    T, N, H = q.shape
    stages, registers = _TUNING[min(width for width in _TUNING if width >= H)][which]
    strides = {name + axis: x.stride(i) for name, x in views.items() for i, axis in enumerate("TN")}
    shape = {"N": N, "H": H, "HP": max(16, triton.next_power_of_2(H)), "CROSS": other is not None}
    settings = {"num_warps": 4, "num_stages": stages, "maxnreg": registers}
    inputs = (q, views["K"], views["V"], tiles, other, T)
    kernel[(len(tiles) * N,)](*inputs, *arguments, **shape, **strides, **kind, **settings)


def _parts(projections: Sequence[Tensor], qk: Tensor | None = None) -> list[Tensor]:
    """q, k and v, (tokens, N, H) each: views; q and k are the rotated ones if there are any."""
    parts = [part for projection in projections for part in projection.unbind(2)]
    return parts if qk is None or not qk.numel() else [*qk.unbind(2), parts[2]]


# ------------------------------------------------------------------------------------------------------------- op
# The op takes whole projections, and its gradient has one tensor for each: were the three parts of a projection three
# arguments, autograd would put their gradients together afterwards, three quarters more traffic than the kernels' own
# 8 · T · N · H elements. An operator cannot leave a tensor out of its results: without rotation qk has no elements.


@torch.library.custom_op("moltron::packed_attention", mutates_args=())
def _attention(
    projections: Sequence[Tensor],
    q_tiles: Tensor,
    q_starts: Tensor | None,  # the three of the other stream: None for self-attention
    k_tiles: Tensor | None,
    k_starts: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    bias_table: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    first = projections[0]
    T, N, _, H = first.shape
    out, lse = first.new_empty(T, N, H), first.new_empty(N, T, dtype=torch.float32)
    with torch.cuda.device_of(first):
        qk = first.new_empty(0) if cos is None or sin is None else _rotate(first, cos, sin)
        views = dict(zip("QKV", _parts(projections, qk)))
        radius = -1 if bias_table is None else bias_table.shape[1] // 2
        arguments = (scale, bias_table, out, lse)
        _launch(forward_kernel, _FORWARD, q_tiles, k_starts, arguments, views, CAUSAL=causal, RADIUS=radius)
    return out, lse, qk


@_attention.register_fake
def _(projections, q_tiles, q_starts, k_tiles, k_starts, cos, sin, bias_table, causal, scale):
    first = projections[0]
    T, N, _, H = first.shape
    qk = first.new_empty(0) if cos is None else first.new_empty(T, N, 2, H)
    return first.new_empty(T, N, H), first.new_empty(N, T, dtype=torch.float32), qk


@torch.library.custom_op("moltron::packed_attention_backward", mutates_args=())
def _attention_backward(
    projections: Sequence[Tensor],
    q_tiles: Tensor,
    q_starts: Tensor | None,
    k_tiles: Tensor | None,
    k_starts: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    causal: bool,
    scale: float,
    qk: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> list[Tensor]:
    dout, stats = dout.contiguous(), lse.new_empty(*lse.shape, 2)
    gradients = [x.new_empty(x.shape) for x in projections]
    views, dq, dk, dv = dict(zip("QKV", _parts(projections, qk))), *_parts(gradients)
    with torch.cuda.device_of(dout):
        kind = {"CAUSAL": causal, "ROTATED": cos is not None}
        views |= {"DK": dk, "DV": dv}
        arguments = (scale, cos, sin, dout, stats, dq, dk, dv, out, lse)
        _launch(dq_kernel, _DQ, q_tiles, k_starts, arguments, views | {"DQ": dq}, **kind)
        tiles = q_tiles if k_tiles is None else k_tiles
        arguments = (scale, cos, sin, dout, stats, dk, dv)
        _launch(dkdv_kernel, _DKDV, tiles, q_starts, arguments, views, **kind)
    return gradients


@_attention_backward.register_fake
def _(projections, *_):
    return [x.new_empty(x.shape) for x in projections]


def _save(ctx, inputs, output) -> None:
    projections, *indices, bias_table, ctx.causal, ctx.scale = inputs
    out, lse, qk = output
    ctx.mark_non_differentiable(lse, qk)
    ctx.has_bias, ctx.num_indices = bias_table is not None, len(indices)
    ctx.save_for_backward(*indices, qk, out, lse, *projections)


def _backward(ctx, dout, *_):
    if ctx.has_bias:
        raise ValueError(_NO_GRADIENT)
    saved, n = ctx.saved_tensors, ctx.num_indices
    indices, results, projections = saved[:n], saved[n : n + 3], list(saved[n + 3 :])
    backward = torch.ops.moltron.packed_attention_backward
    gradients = backward(projections, *indices, ctx.causal, ctx.scale, *results, dout)
    return gradients, *[None] * (n + 3)


_attention.register_autograd(_backward, setup_context=_save)

# -------------------------------------------------------------------------------------------------------- functions

_NO_GRADIENT = (
    "attention with a bias table has no gradient in the Triton kernels: call it under torch.no_grad(), or attend with "
    "scaled_dot_product_attention and the bias as its mask"
)


def packed_attention(qkv_TN3H: Tensor, tiles: Tensor, rotary: Rotary) -> Tensor:
    """Softmax(q kᵀ / √H) v within each sequence, bidirectional; q and k are rotated first if `rotary` is not None.

    qkv_TN3H: (T, N, 3, H) fp16 or bf16, as the projection wrote it. tiles: `Layout.tiles`. rotary: cosine and sine of
    every token, (T, H/2) or (T, 1, H/2) fp32, `positions.rotary_table`. Returns (T, N, H) in the dtype of qkv; its
    gradient is one (T, N, 3, H) tensor. Raises ValueError for head widths but multiples of 8 up to 128.
    """
    _check_width(qkv_TN3H)
    cos, sin = (None, None) if rotary is None else (x.flatten(1) for x in rotary)
    scale = qkv_TN3H.shape[-1] ** -0.5
    projections = [qkv_TN3H.contiguous()]
    return torch.ops.moltron.packed_attention(projections, tiles, None, None, None, cos, sin, None, False, scale)[0]


def attend_projections(
    projections: Sequence[Tensor],
    q_layout: Layout,
    k_layout: Layout,
    *,
    causal: bool,
    bias_table: Tensor | None,
    scale: float,
) -> Tensor:
    """Softmax(scale · q kᵀ + bias) v, sequence i of `q_layout` to sequence i of `k_layout`. Returns (T, N, H).

    projections: fp16 or bf16, each (tokens, N, P, H), their parts in order q, k and v: [qkv_TN3H], [q_TN1H, kv_SN2H],
    …; one gradient each. The same `Layout` twice is self-attention. A query of a sequence without keys gets 0.
    causal: a query sees keys up to its own position; self-attention only.
    bias_table: (N, 2R+1) fp32, added to the scaled score of each pair: column clamp(key − query, −R, R) + R, positions
    counted in their sequences. Without gradient.
    scale: of the products, > 0.
    Raises ValueError for what does not fit: shapes, head widths but multiples of 8 up to 128, a bias under autograd.
    """
    _check(projections, q_layout, k_layout, causal, bias_table, scale)
    projections = [x if x.stride(-1) == 1 else x.contiguous() for x in projections]
    if bias_table is not None:
        bias_table = bias_table.contiguous()
    other = (None, None, None)
    if q_layout is not k_layout:
        other = q_layout.cu_seqlens, k_layout.tiles, k_layout.cu_seqlens
    return torch.ops.moltron.packed_attention(
        projections, q_layout.tiles, *other, None, None, bias_table, causal, scale
    )[0]


def _check_width(x: Tensor) -> None:
    head_dim = x.shape[-1]
    if head_dim % 8 or not 8 <= head_dim <= 128:
        raise ValueError(f"head width {head_dim}: the Triton kernels take multiples of 8 up to 128")


def _check(
    projections: Sequence[Tensor],
    q_layout: Layout,
    k_layout: Layout,
    causal: bool,
    bias_table: Tensor | None,
    scale: float,
) -> None:
    first = projections[0]
    _check_width(first)
    N, H = first.shape[1], first.shape[3]
    T, S = q_layout.positions.shape[0], k_layout.positions.shape[0]
    found = [(x.shape[0], x.shape[1], x.shape[3]) for x in projections for _ in range(x.shape[2])]
    if found != [(T, N, H), (S, N, H), (S, N, H)]:
        raise ValueError(
            f"(tokens, heads, width) of q, k and v are {found}: wanted are three of equal heads and widths, with as "
            f"many tokens as their layouts, {T} and {S}"
        )
    if any(x.dtype != first.dtype for x in projections):
        raise ValueError(f"q, k and v must have one dtype, not {', '.join(str(x.dtype) for x in projections)}")
    if q_layout.cu_seqlens.shape != k_layout.cu_seqlens.shape:
        sequences = [layout.cu_seqlens.shape[0] - 1 for layout in (q_layout, k_layout)]
        raise ValueError(f"{sequences[0]} sequences of queries and {sequences[1]} of keys: they attend one to one")
    if causal and q_layout is not k_layout:
        raise ValueError("causal attention is within one stream: pass one Layout for queries and keys")
    if not scale > 0:
        raise ValueError(f"scale {scale}: must be positive")
    if bias_table is None:
        return
    if bias_table.ndim != 2 or bias_table.shape[0] != N or bias_table.shape[1] % 2 == 0:
        raise ValueError(f"bias table of shape {tuple(bias_table.shape)}: wanted is (heads, 2R+1) with {N} heads")
    if bias_table.dtype != torch.float32:
        raise ValueError(f"bias table of {bias_table.dtype}: wanted is float32")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*projections, bias_table)):
        raise ValueError(_NO_GRADIENT)
