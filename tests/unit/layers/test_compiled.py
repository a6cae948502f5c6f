"""Compiled once for any number of rows, modules of torch.nn too, with eager's numbers."""

from functools import partial

import pytest
import torch
from torch import nn

from moltron.layers.compiled import compile_by_row
from moltron.layers.losses import cross_entropy_sum

NORM = nn.LayerNorm(24)
CASES = {
    "norm": (NORM.forward, 1, lambda m: (torch.randn(m, 24, requires_grad=True),)),
    "loss": (cross_entropy_sum, 2, lambda m: (torch.randn(m, 33, requires_grad=True), torch.randint(0, 33, (m,)))),
}


@pytest.mark.parametrize("name", CASES)
def test_one_compilation_for_any_number_of_rows(name):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    function, rows, make = CASES[name]
    compiled = compile_by_row(function, rows)
    for m in (64, 128, 192, 7):
        torch.manual_seed(m)
        args = make(m)
        if name == "loss":
            args[1][:3] = -100
        found, expected = compiled(*args), function(*args)
        found, expected = (x if isinstance(x, torch.Tensor) else x[0] for x in (found, expected))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
        gradients = [torch.autograd.grad(x.square().sum(), args[0])[0] for x in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_torch_keeps_compilations_of_any_number_of_functions(monkeypatch):
    """It keeps eight of one code object, and with fullgraph fails at the next (its recompile_limit)."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    functions = [compile_by_row(lambda x, i=i: x * i) for i in range(12)]
    for m in (64, 7):
        for i, function in enumerate(functions):
            assert torch.equal(function(torch.ones(m, 2)), torch.full((m, 2), float(i)))
