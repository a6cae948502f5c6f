"""Losses as (sum, count): one place, the training step, divides by the count over all ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def cross_entropy_sum(logits_MV: Tensor, targets_M: Tensor) -> tuple[Tensor, Tensor]:
    """Σ −log p(target) in fp32 (nats) and the number of targets; targets of −100 do not count. Both 0-dim."""
    loss = F.cross_entropy(logits_MV.float(), targets_M, ignore_index=IGNORE, reduction="sum")
    return loss, (targets_M != IGNORE).sum()
