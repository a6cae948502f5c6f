"""FP8 products beside those in float64, by recipe; what is swapped and what is not."""

import pytest
import torch
from torch import nn

from moltron.layers.fp8 import E4M3, RECIPES, Float8Linear, quantize
from moltron.models.registry import build_model
from moltron.parallel.precision import swap_to_fp8


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def linears(recipe, bias=True):
    """The same layer in float64 and, of half-precision weights, in FP8."""
    torch.manual_seed(0)
    exact = nn.Linear(96, 160, bias).bfloat16().double()
    swapped = nn.Linear(96, 160, bias).bfloat16()
    swapped.load_state_dict(exact.state_dict())
    Float8Linear.swap(swapped, recipe)
    return exact, swapped


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_and_gradients_are_those_of_float64_up_to_the_formats_precision(recipe, bias):
    """e4m3 has 3 bits, e5m2 2: rounding is off by up to 2⁻⁴ and 2⁻³, uniformly, a third of that on average."""
    exact, swapped = linears(recipe, bias)
    x = torch.randn(256, 96).bfloat16().requires_grad_()
    x_exact, g = x.detach().double().requires_grad_(), torch.randn(256, 160).bfloat16()
    y, y_exact = swapped(x), exact(x_exact)
    y.backward(g)
    y_exact.backward(g.double())
    assert y.dtype == x.grad.dtype == swapped.weight.grad.dtype == torch.bfloat16
    assert 0.01 < apart(y, y_exact) < 0.05  # not bf16's
    assert 0.02 < apart(x.grad, x_exact.grad) < 0.08
    assert 0.02 < apart(swapped.weight.grad, exact.weight.grad) < 0.08
    if bias:
        assert apart(swapped.bias.grad, exact.bias.grad) < 0.01


@pytest.mark.parametrize("recipe, good", [("tensorwise", False), ("rowwise", True)])
def test_an_outlier_costs_its_own_row_or_all_of_them(recipe, good):
    exact, swapped = linears(recipe)
    x = torch.randn(256, 96).bfloat16()
    x[0, 0] = 2.0**16
    others = slice(1, None)
    assert (apart(swapped(x)[others], exact(x.double())[others]) < 0.05) == good


def test_scales_are_powers_of_two_and_nothing_overflows():
    x = torch.randn(32, 48) * 10.0 ** torch.arange(-30, 34, 2)[:, None]
    for recipe in RECIPES:
        values, scale = quantize(x, E4M3, 1, recipe)
        assert values.float().isfinite().all() and (torch.frexp(scale).mantissa == 0.5).all()
    assert (apart(values.double() * scale, x)) < 0.04
    assert quantize(torch.zeros(2, 16), E4M3, 1, "rowwise")[0].float().abs().max() == 0
    x[3, 4] = torch.nan
    assert quantize(x, E4M3, 1, "rowwise")[0][3].isnan().any()  # the loop sees it in the loss


def test_leading_dimensions_stay():
    _, swapped = linears("tensorwise")
    x = torch.randn(2, 16, 96).bfloat16()
    assert torch.equal(swapped(x), swapped(x.flatten(0, 1)).view(2, 16, 160))


def test_first_and_last_block_stay_and_names_do_not_change():
    model = build_model("esm2", dict(hidden_size=32, num_layers=4, num_heads=2, ffn_size=64))
    names = list(model.state_dict())
    swap_to_fp8(list(model.layers.values()), "rowwise")
    swapped = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    inner = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    assert swapped == {f"layers.{i}.{name}" for i in (1, 2) for name in inner}
    assert list(model.state_dict()) == names
