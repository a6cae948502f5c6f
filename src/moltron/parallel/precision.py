"""Precision as a policy: fp32 master weights; what is gathered, computed and reduced is decided here.

Statistics, softmax and losses stay in fp32 in the models themselves; no autocast anywhere.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto → bf16 on CUDA, fp32 on a CPU."""
    if precision == "auto":
        return "bf16" if device.type == "cuda" else "fp32"
    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r} is unknown; there are: auto, {', '.join(DTYPES)}")
    return precision


def mixed_precision(precision: str) -> MixedPrecisionPolicy:
    """Gather and compute in `precision`, reduce gradients in fp32.

    Inputs are not cast: the hidden state has the dtype of the embedding's weights, thus `precision`, and rotary tables
    stay in fp32, where bf16 would be off by up to 2⁻⁹ of each cosine and sine.
    """
    if precision == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(DTYPES[precision], reduce_dtype=torch.float32, cast_forward_inputs=False)
