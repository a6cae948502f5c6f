"""The model families, in an explicit list, and how one is built from plain values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moltron.layers.attention import fits_kernels
from moltron.models import esm1, esm2, megamolbart, prott5
from moltron.models.spec import ModelSpec

FAMILIES: dict[str, ModelSpec] = {spec.name: spec for spec in (esm1.SPEC, esm2.SPEC, prott5.SPEC, megamolbart.SPEC)}


def get_spec(family: str) -> ModelSpec:
    if family not in FAMILIES:
        raise ValueError(f"model.family={family!r} is unknown; there are: {', '.join(FAMILIES)}")
    return FAMILIES[family]


def architecture_problems(family: Any, architecture: Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a model section of the configuration, as sentences; [] when it can be built."""
    if family not in FAMILIES:
        return [f"model.family={family!r} is unknown; there are: {', '.join(FAMILIES)}"]
    fields = {f.name: f for f in dataclasses.fields(FAMILIES[family].config)}
    problems = [
        f"model.{key} is no field of {family}; there are: {', '.join(fields)}"
        for key in architecture
        if key not in fields
    ]
    kinds = {"int": int, "float": (int, float), "bool": bool, "str": str}
    for name, field in fields.items():
        value = architecture.get(name, field.default)
        if value is dataclasses.MISSING:
            problems.append(f"model.{name} is missing")
        elif not isinstance(value, kinds[str(field.type)]) or (field.type != "bool" and isinstance(value, bool)):
            problems.append(f"model.{name}={value!r} is not of type {field.type}")
        elif field.type == "float" and value < 0:
            problems.append(f"model.{name}={value} must not be negative")
        elif field.type == "int" and value < (least := field.metadata.get("least", 1)):
            problems.append(f"model.{name}={value} must be at least {least}")
        elif value not in field.metadata.get("choices", (value,)):
            problems.append(f"model.{name}={value!r} must be one of {', '.join(field.metadata['choices'])}")
    hidden, heads = architecture.get("hidden_size"), architecture.get("num_heads")
    if not architecture.get("head_dim") and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        if hidden % heads:
            problems.append(f"model.hidden_size={hidden} is not a multiple of model.num_heads={heads}")
        elif (hidden // heads) % 2:
            problems.append(f"head width model.hidden_size/num_heads={hidden // heads} must be even")
    return problems


def make_config(family: str, architecture: Mapping[str, Any]) -> Any:
    """The family's config dataclass from plain values. Raises ValueError naming every problem."""
    problems = architecture_problems(family, architecture)
    if problems:
        raise ValueError("; ".join(problems))
    return get_spec(family).config(**architecture)


def build_model(family: str, architecture: Mapping[str, Any], device: str | torch.device = "meta") -> nn.Module:
    """A model with shapes but without numbers: follow with `init_weights(seed)` or load weights."""
    with torch.device(device):
        return get_spec(family).model(make_config(family, architecture))


def compiles(config: Any, precision: str, device_type: str, trains: bool = True) -> bool:
    """Whether a model's blocks can be compiled: their attention must go by the Triton kernels."""
    head_dim = getattr(config, "head_dim", 0) or config.hidden_size // config.num_heads
    half = device_type == "cuda" and precision != "fp32"
    return half and fits_kernels(head_dim) and (not trains or getattr(config, "trains_compiled", True))
