"""Attention over packed sequences: the one place that chooses a kernel.

Sequences lie end to end on one token axis; `Layout` says where each begins. `attend_qkv` never looks across a boundary,
whatever the kernel:

    CUDA, fp16/bf16    Triton kernels that rotate as well (triton_attention)
    everything else    SDPA, one call per run of neighbours of equal length (padding would change the last bits)

Knows nothing of models or vocabularies.

T tokens (packed), N heads, H head width, B sequences
"""

from __future__ import annotations

from importlib.util import find_spec
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

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
    half, head_dim = qkv_TN3H.dtype in (torch.float16, torch.bfloat16), qkv_TN3H.shape[-1]
    if packed_attention and half and qkv_TN3H.is_cuda and head_dim % 8 == 0 and head_dim <= 128:
        return packed_attention(qkv_TN3H, layout.tiles, rotary)
    q_TNH, k_TNH, v_TNH = qkv_TN3H.unbind(2)
    if rotary is not None:
        q_TNH, k_TNH = apply_rotary(q_TNH, *rotary), apply_rotary(k_TNH, *rotary)
    return _attend_by_length(q_TNH, k_TNH, v_TNH, layout.lengths)


def _attend_by_length(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, lengths: tuple[int, ...]) -> Tensor:
    runs = [(length, sum(1 for _ in run)) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outs = []
    for (length, count), q, k, v in zip(runs, q_TNH.split(sizes), k_TNH.split(sizes), v_TNH.split(sizes), strict=True):
        q_BNLH, k_BNLH, v_BNLH = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out_BNLH = F.scaled_dot_product_attention(q_BNLH, k_BNLH, v_BNLH)
        outs.append(out_BNLH.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)
