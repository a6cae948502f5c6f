"""Attention over packed sequences: the one place that chooses a kernel.

Sequences lie end to end on one token axis; `Layout` says where each begins. `attend` never looks across a boundary,
whatever the kernel:

    CUDA, fp16/bf16   varlen flash attention
    CUDA, fp32        FlexAttention with a block mask of the boundaries
    CPU               SDPA, one call per run of neighbours of equal length (padding would change the last bits)

Knows nothing of models, positions or vocabularies.

T tokens (packed), N heads, H head width, B sequences
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


@dataclass(eq=False)
class Layout:
    """Where the sequences of one packed token axis begin and end.

    cu_seqlens: (B+1,) int32, starts at 0, ends at T; filler at the end is a sequence of its own.
    positions: (T,) int32, 0, 1, 2 … within each sequence.
    max_seqlen: an upper bound of the lengths, kept constant over a run so that nothing recompiles.
    lengths: the B lengths on the host, so that no path waits for the device.
    """

    cu_seqlens: Tensor
    positions: Tensor
    max_seqlen: int
    lengths: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Layout:
        move = dict(device=device, non_blocking=non_blocking)
        return Layout(self.cu_seqlens.to(**move), self.positions.to(**move), self.max_seqlen, self.lengths)

    def sequence_index(self) -> Tensor:
        """(T,) int64: which sequence each token belongs to."""
        num_tokens = self.positions.shape[0]
        ends = self.cu_seqlens[1:]
        return torch.bucketize(torch.arange(num_tokens, device=ends.device, dtype=ends.dtype), ends, right=True)


def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, layout: Layout) -> Tensor:
    """Softmax(q kᵀ / √H) v within each sequence of `layout`, bidirectional; returns (T, N, H)."""
    if q_TNH.device.type != "cuda":
        return _attend_by_length(q_TNH, k_TNH, v_TNH, layout.lengths)
    if q_TNH.dtype in (torch.float16, torch.bfloat16):
        cu, longest = layout.cu_seqlens, layout.max_seqlen
        return varlen_attn(q_TNH, k_TNH, v_TNH, cu, cu, longest, longest)
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
