"""Linear layers whose three matrix products run in FP8 (Micikevicius et al. 2022, arXiv:2209.05433).

    forward     y_TN = x_TK · wᵀ_KN                  every factor is scaled to the range of its format and cast; what
    backward    dx_TK = g_TN · w_NK, dw_NK = gᵀ_NT · x_TK       comes out of the matrix units is scaled back

Weights and activations are e4m3, gradients e5m2; sums, biases and what comes out are in the input's dtype or above. A
scale is of a whole tensor ("tensorwise") or of each row of the left and column of the right factor ("rowwise"), always
a power of two, which rounds nothing. torch.compile fuses scaling and casts with what is before them. Knows nothing of
models: which layers are swapped is decided elsewhere.

T tokens, K width in, N width out; T, K and N are multiples of 16
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

RECIPES = ("tensorwise", "rowwise")
MULTIPLE = 16  # of all three sizes: what the matrix units ask for
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


Quantized = tuple[Tensor, Tensor]  # x / scale in FP8, and the scale, fp32


def quantize(x: Tensor, dtype: torch.dtype, dim: int, recipe: str) -> Quantized:
    """x: a matrix that a product sums over along `dim`. The scale is a power of two, as large as x's range asks."""
    largest = x.abs().amax(dim, keepdim=True)  # first of rows in either recipe: fuses with a norm before it
    if recipe == "tensorwise":
        largest = largest.amax()
    scale = torch.exp2(torch.ceil(torch.log2(largest.float().clamp(min=1e-30) / torch.finfo(dtype).max)))
    return (x.float() / scale).to(dtype), scale


def multiply(a_MK: Quantized, b_KN: Quantized, dtype: torch.dtype, **options: Any) -> Tensor:
    """(M, N) in `dtype`. The matrix units read both factors along K."""
    (a, scale_a), (b, scale_b) = a_MK, b_KN
    settings: Any = dict(scale_a=scale_a.flatten()[:, None], scale_b=scale_b.flatten()[None], out_dtype=dtype)
    return torch._scaled_mm(a.contiguous(), b.t().contiguous().t(), **settings, **options)


def transpose(x: Quantized) -> Quantized:
    return x[0].t(), x[1].t()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None, recipe: str) -> Tensor:
        ctx.save_for_backward(x_TK, weight_NK)
        ctx.recipe, ctx.has_bias = recipe, bias_N is not None
        x, w = quantize(x_TK, E4M3, 1, recipe), quantize(weight_NK, E4M3, 1, recipe)
        return multiply(x, transpose(w), x_TK.dtype, bias=bias_N, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        x_TK, weight_NK = ctx.saved_tensors
        across = 1 if ctx.recipe == "tensorwise" else 0  # one scale: the same numbers for either way to sum
        x, w = (quantize(tensor, E4M3, across, ctx.recipe) for tensor in (x_TK, weight_NK))
        g = quantize(g_TN, E5M2, 1, ctx.recipe)
        dx_TK = multiply(g, w, g_TN.dtype)
        g = g if ctx.recipe == "tensorwise" else quantize(g_TN, E5M2, 0, ctx.recipe)
        dw_NK = multiply(transpose(g), x, g_TN.dtype)
        return dx_TK, dw_NK, g_TN.sum(0) if ctx.has_bias else None, None


class Float8Linear(nn.Linear):
    """As nn.Linear of half-precision inputs (…, K), by `recipe`."""

    recipe: str

    @staticmethod
    def swap(linear: nn.Linear, recipe: str) -> None:
        """Make a linear layer one of these, in place: parameters, names and initialisation stay."""
        linear.__class__ = Float8Linear
        linear.recipe = recipe  # type: ignore[assignment]

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input, self.weight, self.bias)

    def product(self, input: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        y_TN = _Product.apply(input.flatten(0, -2), weight_NK, bias_N, self.recipe)
        return y_TN.unflatten(0, input.shape[:-1])  # type: ignore[union-attr]
