"""Attention over packed sequences: the one place that chooses a kernel.

Sequences lie end to end on one token axis; `Layout` says where each begins. `attend_qkv` never looks across a boundary,
whatever the kernel:

    CUDA, fp16/bf16   Triton kernels that also rotate (triton_attention); varlen flash for head widths they cannot take
    CUDA, fp32        FlexAttention with a block mask of the boundaries
    CPU               SDPA, one call per run of neighbours of equal length (padding would change the last bits)

Knows nothing of models or vocabularies.

T tokens (packed), N heads, H head width, B sequences
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from moltron.layers.layout import Layout
from moltron.layers.positions import Rotary, apply_rotary

# Every CUDA build of torch for Linux brings Triton, the others come without. Imported here rather than where it is
# called, so that torch.compile finds the op registered.
if find_spec("triton") is None:
    packed_attention = None
else:
    from moltron.layers.triton_attention import packed_attention


def attend_qkv(qkv_TN3H: Tensor, layout: Layout, rotary: Rotary) -> Tensor:
    """Softmax(q kᵀ / √H) v within each sequence of `layout`, bidirectional; q and k are rotated first, with a `rotary`.

    qkv_TN3H: as one projection writes it. Returns (T, N, H).
    """
    on_cuda, half = qkv_TN3H.device.type == "cuda", qkv_TN3H.dtype in (torch.float16, torch.bfloat16)
    head_dim = qkv_TN3H.shape[-1]
    if on_cuda and half and packed_attention is not None and head_dim % 8 == 0 and head_dim <= 128:
        return packed_attention(qkv_TN3H, layout.tiles, rotary)
    q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
    if rotary is not None:
        q_TNH, k_TNH = apply_rotary(q_TNH, *rotary), apply_rotary(k_TNH, *rotary)
    if not on_cuda:
        return _attend_by_length(q_TNH, k_TNH, v_TNH, layout.lengths)
    if half:
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        return cast(Tensor, varlen_attn(q_TNH, k_TNH, v_TNH, cu, cu, longest, longest))  # a pair only if asked for
    return _attend_flex(q_TNH, k_TNH, v_TNH, layout)


def _attend_by_length(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, lengths: tuple[int, ...]) -> Tensor:
    runs = [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outs = []
    for (length, count), q, k, v in zip(runs, q_TNH.split(sizes), k_TNH.split(sizes), v_TNH.split(sizes), strict=True):
        q_BNLH, k_BNLH, v_BNLH = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH)
        outs.append(out_BNLH.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _attend_flex(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    sequence = layout.sequence_index()

    def same_sequence(batch, head, query, key):
        return sequence[query] == sequence[key]

    num_tokens = q_TNH.shape[0]
    mask = create_block_mask(same_sequence, None, None, num_tokens, num_tokens, device=q_TNH.device, _compile=True)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TNH, v_TNH))
    return _compiled_flex()(q, k, v, block_mask=mask).squeeze(0).transpose(0, 1)
