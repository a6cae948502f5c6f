"""What is learned: each objective corrupts a packed batch and measures the model's answer as (sum, count)."""

from __future__ import annotations

from typing import Any

from moltron.config.schema import ObjectiveConfig
from moltron.objectives.masked_lm import MaskedLM

OBJECTIVES = {"masked_lm": MaskedLM}


def get_objective(config: ObjectiveConfig, tokenizer: Any, seed: int) -> MaskedLM:
    """The objective that `config.name` names; ValueError where there is none."""
    if config.name not in OBJECTIVES:
        raise ValueError(f"objective.name={config.name!r} is not known: use one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.name](config, tokenizer, seed)
