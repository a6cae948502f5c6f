"""The Triton attention op where no kernel runs: what is refused, and what is traced, on any machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: CUDA builds of torch and the extra dev bring it")

from moltron.layers.layout import Layout
from moltron.layers.triton_attention import attend_projections, packed_attention


def layout_of(lengths: list[int], device: str = "cpu") -> Layout:
    return Layout.of(np.array(lengths)).each(lambda x: x.to(device))


@pytest.mark.parametrize("head_dim", [12, 136])
def test_head_widths_that_do_not_fit_are_refused(head_dim):
    with pytest.raises(ValueError, match="multiples of 8"):
        packed_attention(torch.empty(4, 2, 3, head_dim), layout_of([4]).tiles, None)


@pytest.mark.parametrize("rotates", [True, False])
def test_the_op_traces_without_a_device(rotates):
    qkv = torch.empty(32, 2, 3, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.empty(32, 1, 8, device="meta")
    out = packed_attention(qkv, layout_of([32], "meta").tiles, (angles, angles) if rotates else None)
    out.sum().backward()
    assert out.shape == (32, 2, 16) and qkv.grad is not None and qkv.grad.shape == qkv.shape


def refused(**changes) -> str:
    """What `attend_projections` says to a cross-attention that is fine but for `changes`."""
    half: dict[str, Any] = dict(dtype=torch.float16, requires_grad=True)
    q, kv = torch.empty(4, 2, 1, 16, **half), torch.empty(6, 2, 2, 16, **half)
    arguments: dict[str, Any] = dict(projections=[q, kv], q_layout=layout_of([3, 1]), k_layout=layout_of([2, 4]))
    arguments |= dict(causal=False, bias_table=None, scale=0.25) | changes
    with pytest.raises(ValueError) as error:
        attend_projections(**arguments)
    return str(error.value)


def test_what_does_not_fit_is_refused():
    half: dict[str, Any] = dict(dtype=torch.float16)
    q, kv = torch.empty(4, 2, 1, 16, **half), torch.empty(6, 2, 2, 16, **half)
    assert "multiples of 8" in refused(projections=[q[..., :12], kv[..., :12]])
    assert "as many tokens as their layouts, 4 and 6" in refused(projections=[q, kv[:5]])
    assert "as many tokens" in refused(projections=[q, kv[:, :, :1]])
    assert "equal heads" in refused(projections=[q, kv[:, :1]])
    assert "one dtype" in refused(projections=[q, kv.bfloat16()])
    assert "2 sequences of queries and 3 of keys" in refused(k_layout=layout_of([2, 4, 0]))
    assert "within one stream" in refused(causal=True)
    assert "must be positive" in refused(scale=0.0)
    assert "wanted is (heads, 2R+1) with 2 heads" in refused(bias_table=torch.empty(2, 4))
    assert "float32" in refused(bias_table=torch.empty(2, 5, **half))
    assert "has no gradient" in refused(bias_table=torch.empty(2, 5))
    table = torch.empty(2, 5, requires_grad=True)
    assert "has no gradient" in refused(projections=[q, kv], bias_table=table)


def test_projections_get_a_gradient_each():
    shapes = [(4, 2, 1, 16), (6, 2, 2, 16)]
    meta: dict[str, Any] = dict(device="meta", dtype=torch.bfloat16, requires_grad=True)
    projections = [torch.empty(*shape, **meta) for shape in shapes]
    layouts = layout_of([3, 1], "meta"), layout_of([2, 4], "meta")
    out = attend_projections(projections, *layouts, causal=False, bias_table=None, scale=0.25)
    out.sum().backward()
    assert out.shape == (4, 2, 16) and [x.grad.shape for x in projections if x.grad is not None] == [
        x.shape for x in projections
    ]


def test_compiled_into_one_graph_that_knows_the_streams():
    """One layout twice is self-attention, two are not, and the compiler sees the difference."""
    streams = []

    def backend(graph, _):
        calls = [node for node in graph.graph.nodes if str(node.target).startswith("moltron.packed_attention")]
        streams.extend(1 if node.args[3] is None else 2 for node in calls)
        return graph

    def attend(q: Tensor, k: Tensor, v: Tensor, q_layout: Layout, k_layout: Layout) -> Tensor:
        parts = [x[:, :, None] for x in (q + 1, k, v)]
        return attend_projections(parts, q_layout, k_layout, causal=False, bias_table=None, scale=0.25)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    q, k, v = (torch.empty(6, 2, 16, device="meta", dtype=torch.bfloat16) for _ in range(3))
    first, second = layout_of([2, 4], "meta"), layout_of([3, 3], "meta")
    for pair in ((first, first), (first, second), (second, second), (second, first)):
        assert compiled(q, k, v, *pair).shape == q.shape
    assert streams in ([1, 2], [1, 2, 1, 2])
