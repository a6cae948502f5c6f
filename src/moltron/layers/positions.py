"""Rotary positions (Su et al. 2021, arXiv:2104.09864; ESM-2, Lin et al. 2023): spec models.md §2.

T tokens (packed), N heads, H head width
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor] | None  # cosine and sine of every token's angles; None: positions are not rotary


def rotary_frequencies(
    head_dim: int, base: float, rounded_to: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """base^(-2i / H) for i in 0 … H/2 - 1, (H/2,) fp32, rounded to another dtype first."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.int64).float() / head_dim
    return (1.0 / base**exponents).to(rounded_to).float()


def rotary_table(
    positions: Tensor, head_dim: int, base: float, rounded_to: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, (T, 1, H/2) fp32 each; made once a forward, so no length is too long."""
    angles = positions.float()[:, None] * rotary_frequencies(head_dim, base, rounded_to, positions.device)
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rotary(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin), in the precision of the table."""
    first, second = x_TNH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TNH.dtype)
