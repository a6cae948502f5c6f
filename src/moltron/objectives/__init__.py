"""What is learned: an objective makes packed batches with targets, and measures the answer as (sum, count)."""

from __future__ import annotations

from typing import Any

from moltron.config.schema import ObjectiveConfig
from moltron.objectives.denoising import Denoising
from moltron.objectives.masked_lm import MaskedLM
from moltron.objectives.span_corruption import SpanCorruption
from moltron.objectives.streams import Limits, Objective

OBJECTIVES: dict[str, type[Objective]] = {
    "masked_lm": MaskedLM,
    "span_corruption": SpanCorruption,
    "denoising": Denoising,
}

__all__ = ["OBJECTIVES", "Limits", "MaskedLM", "Objective", "get_objective"]


def get_objective(config: ObjectiveConfig, tokenizer: Any, seed: int) -> Objective:
    """The objective that `config.name` names; ValueError where there is none, or its settings cannot work."""
    if config.name not in OBJECTIVES:
        raise ValueError(f"objective.name={config.name!r} is not known: use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.name](config, tokenizer, seed)
