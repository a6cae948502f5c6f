"""One vector a sequence: sums or maxima over runs of rows of the token axis.

T tokens (packed), D width, B runs of rows
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

if find_spec("triton") is None:
    pool_rows = None
else:
    from moltron.layers.triton_pooling import pool_rows


def pool(hidden_TD: Tensor, rows_B2: Tensor, how: str) -> Tensor:
    """(B, D) fp32: of rows [from, to) of `hidden_TD` the "sum" or the "max", each run by itself, first row first.

    rows_B2: int32, the runs in the order of the axis, without overlap. So a result has the same bits whatever else
    there is. An empty run gives 0, or −∞.
    """
    if pool_rows is not None and hidden_TD.is_cuda:
        return pool_rows(hidden_TD, rows_B2, how == "max")
    edges = torch.cat([rows_B2.new_zeros(1), rows_B2.flatten(), rows_B2.new_full((1,), len(hidden_TD))])
    runs_and_gaps = torch.segment_reduce(hidden_TD.float(), how, lengths=edges.diff().long(), axis=0, unsafe=True)
    return runs_and_gaps[1::2]
