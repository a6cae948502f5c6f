"""Rotary positions (Su et al. 2021, arXiv:2104.09864; ESM-2, Lin et al. 2023): spec models.md §2.

T tokens (packed), N heads, H head width
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every token's angles, (T, 1, H/2) fp32 each; made once a forward, so no length is too long."""
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.int64).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / base**exponents)
    return angles.cos()[:, None], angles.sin()[:, None]


def apply_rotary(x_TNH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves (x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin), in the precision of the table."""
    first, second = x_TNH.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TNH.dtype)
