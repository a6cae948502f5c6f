"""Attention over packed sequences: the one place that chooses a kernel.

Sequences lie end to end on one token axis; `Layout` says where each begins. Nothing looks across a boundary, whatever
the kernel: `attend_qkv` for encoders with rotary positions, `attend` for everything else (q and k of different
streams, causal, with a bias by distance). Both take projections whole, as one matrix product wrote them, so that each
has one gradient:

    CUDA, fp16/bf16    Triton kernels (triton_attention)
    everything else    SDPA, one call per run of neighbours of equal lengths (padding would change the last bits)

Knows nothing of models or vocabularies.

T tokens of the queries, S of the keys (packed), N heads, H head width, B sequences, Q and K tokens of one sequence,
P parts of a projection (q, k, v)
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moltron.layers.layout import Layout, Share
from moltron.layers.positions import Rotary, apply_rotary

# Every CUDA build of torch for Linux brings Triton, the others come without. Imported here rather than where it is
# called, so that torch.compile finds the ops registered.
if find_spec("triton") is None:
    packed_attention = attend_projections = None
else:
    from moltron.layers.triton_attention import attend_projections, packed_attention


class RelativeBias(NamedTuple):
    """Added to the score of every query and key of a sequence, by their distance.

    table: (N, 2R+1) fp32 at least; column R + clamp(k − q, −R, R) is for a key k − q tokens behind its query.
    """

    table: Tensor

    def between(self, q_Q: Tensor, k_K: Tensor) -> Tensor:
        """(N, Q, K) for positions of queries and keys."""
        reach = self.table.shape[1] // 2
        return self.table[:, (k_K - q_Q[:, None]).clamp(-reach, reach) + reach]


def attend_qkv(qkv_TN3H: Tensor, layout: Layout, rotary: Rotary) -> Tensor:
    """Softmax(q kᵀ / √H) v within each sequence of `layout`, bidirectional; q and k are rotated first, with a `rotary`.

    qkv_TN3H: as one projection writes it; only this rank's tokens where `layout` has a share. Returns (T, N, H).
    """
    if layout.share is not None:
        return _attend_shared(qkv_TN3H, layout, layout.share, rotary, None, None)
    if packed_attention and _suits_kernels(qkv_TN3H):
        return packed_attention(qkv_TN3H, layout.tiles, rotary)
    q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
    if rotary is not None:
        q_TNH, k_TNH = apply_rotary(q_TNH, *rotary), apply_rotary(k_TNH, *rotary)
    return _attend_by_lengths(q_TNH, k_TNH, v_TNH, layout, layout, False, None, None)


def _attend_shared(
    qkv_TN3H: Tensor, layout: Layout, share: Share, rotary: Rotary, bias: RelativeBias | None, scale: float | None
) -> Tensor:
    """Queries of this rank's tokens, keys and values of all."""
    q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
    if rotary is not None:
        cos, sin = (table[share.start : share.stop] for table in rotary)
        q_TNH, k_TNH = apply_rotary(q_TNH, cos, sin), apply_rotary(k_TNH, cos, sin)
    kv_SN2H = share.gather(torch.stack((k_TNH, v_TNH), 2))
    return attend([q_TNH[:, :, None], kv_SN2H], share.queries, layout, bias=bias, scale=scale)


def attend(
    projections: Sequence[Tensor],
    q_layout: Layout,
    k_layout: Layout,
    *,
    causal: bool = False,
    bias: RelativeBias | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax(scale · q kᵀ + bias) v, (T, N, H): sequence i of `q_layout` looks at sequence i of `k_layout`.

    projections: (tokens, N, P, H) each, their parts in order q, k and v: [qkv_TN3H], or [q_TN1H, kv_SN2H].
    causal: token i sees keys 0 … i of its sequence. scale: None is 1 / √H. A query without any key (an empty sequence
    of `k_layout`) gets zeros. Where `q_layout` has a share, [qkv_TN3H] of this rank's tokens, not causal.
    """
    first = projections[0]
    if q_layout.share is not None:
        return _attend_shared(first, q_layout, q_layout.share, None, bias, scale)
    learns = any(x.requires_grad for x in projections) or (bias is not None and bias.table.requires_grad)
    # with a bias the kernel has no backward, and counts every sequence's queries from its first token
    odd_bias = bias is not None and (q_layout.offsets is not None or (torch.is_grad_enabled() and learns))
    if attend_projections and _suits_kernels(first) and not odd_bias:
        table = None if bias is None else bias.table
        number = first.shape[-1] ** -0.5 if scale is None else scale
        return attend_projections(projections, q_layout, k_layout, causal=causal, bias_table=table, scale=number)
    q_TNH, k_SNH, v_SNH = (part for projection in projections for part in projection.unbind(2))
    return _attend_by_lengths(q_TNH, k_SNH, v_SNH, q_layout, k_layout, causal, bias, scale)


def fits_kernels(head_dim: int) -> bool:
    """Of the Triton kernels. Attention that does not go by them goes by lengths, new in each pack: not compiled."""
    return head_dim % 8 == 0 and head_dim <= 128


def _suits_kernels(x_TNH: Tensor) -> bool:
    half = x_TNH.dtype in (torch.float16, torch.bfloat16)
    return half and x_TNH.is_cuda and fits_kernels(x_TNH.shape[-1])


def _attend_by_lengths(
    q_TNH: Tensor,
    k_SNH: Tensor,
    v_SNH: Tensor,
    q_layout: Layout,
    k_layout: Layout,
    causal: bool,
    bias: RelativeBias | None,
    scale: float | None,
) -> Tensor:
    offsets = q_layout.offsets or (0,) * len(q_layout.lengths)
    sequences = zip(q_layout.lengths, k_layout.lengths, offsets, strict=True)
    runs = [(*lengths, sum(1 for _ in run)) for lengths, run in groupby(sequences)]
    q_sizes, k_sizes = [q * count for q, _, _, count in runs], [k * count for _, k, _, count in runs]
    outs = []
    for (q_length, k_length, offset, count), q, k, v in zip(
        runs, q_TNH.split(q_sizes), k_SNH.split(k_sizes), v_SNH.split(k_sizes), strict=True
    ):
        if not q_length:
            continue
        if not k_length:
            outs.append(torch.zeros_like(q))
            continue
        q_BNQH = q.unflatten(0, (count, q_length)).transpose(1, 2)
        k_BNKH, v_BNKH = (x.unflatten(0, (count, k_length)).transpose(1, 2) for x in (k, v))
        mask_1NQK = None if bias is None else _mask(bias, q_length, k_length, offset, causal).to(q.dtype)
        out_BNQH = F.scaled_dot_product_attention(
            q_BNQH, k_BNKH, v_BNKH, mask_1NQK, is_causal=causal and bias is None, scale=scale
        )
        outs.append(out_BNQH.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def _mask(bias: RelativeBias, q_length: int, k_length: int, offset: int, causal: bool) -> Tensor:
    """(1, N, Q, K) to add to the scores; −∞ where a causal query must not look. offset: keys before the first query.

    With three dimensions SDPA would leave its CPU kernel, whose bits do not depend on the batch, for matrix products.
    """
    device = bias.table.device
    q_Q, k_K = torch.arange(offset, offset + q_length, device=device), torch.arange(k_length, device=device)
    mask_1NQK = bias.between(q_Q, k_K)[None]
    return mask_1NQK.masked_fill(k_K > q_Q[:, None], -torch.inf) if causal else mask_1NQK
