"""Sums and maxima over runs of rows, in one pass over them: `torch.segment_reduce` needs ten times as long on an H100.

T tokens (packed), D width, B runs of rows
"""

# pyright: reportIndexIssue=false, reportMissingImports=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor


# fmt: off
@triton.jit
def pool_kernel(HIDDEN, ROWS, OUT, D: tl.constexpr, MAX: tl.constexpr, ROWS_A_STEP: tl.constexpr, WIDE: tl.constexpr):
    """One program: WIDE columns of one run, ROWS_A_STEP rows side by side, in fp32."""
    run, columns = tl.program_id(0), tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    begin, end = tl.load(ROWS + 2 * run), tl.load(ROWS + 2 * run + 1)
    nothing = float("-inf") if MAX else 0.0
    found = tl.full((ROWS_A_STEP, WIDE), nothing, tl.float32)
    for first in range(begin, end, ROWS_A_STEP):
        rows = first + tl.arange(0, ROWS_A_STEP)
        inside = (rows < end)[:, None] & (columns < D)[None, :]
        places = HIDDEN + rows.to(tl.int64)[:, None] * D + columns[None, :]
        x = tl.load(places, mask=inside, other=nothing).to(tl.float32)
        found = tl.maximum(found, x) if MAX else found + x
    result = tl.max(found, 0) if MAX else tl.sum(found, 0)
    tl.store(OUT + run.to(tl.int64) * D + columns, result, mask=columns < D)
# fmt: on


def pool_rows(hidden_TD: Tensor, rows_B2: Tensor, is_max: bool) -> Tensor:
    """As `pooling.pool`; the runs may be in any order."""
    hidden_TD, (B, D) = hidden_TD.contiguous(), (len(rows_B2), hidden_TD.shape[1])
    out_BD = torch.empty(B, D, dtype=torch.float32, device=hidden_TD.device)
    wide = min(128, triton.next_power_of_2(D))
    with torch.cuda.device_of(hidden_TD):
        pool_kernel[(B, triton.cdiv(D, wide))](hidden_TD, rows_B2, out_BD, D, is_max, 2048 // wide, wide)
    return out_BD
