"""Two-way tables between our parameter names and another layout's, and the walk over such a table.

    other layout's tensors ──read──> (our name, tensor) …          our tensors ──write──> (their name, tensor) …

Tensors come and go one at a time, so that a big model is never in memory twice. Knows nothing of files or families.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    """One of our parameters, and the tensors it is made of elsewhere. `optional` ones may be missing there."""

    ours: str
    theirs: tuple[str, ...]
    merge: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: (tensor,)
    optional: bool = False


@dataclass(frozen=True)
class Layout:
    """rows: the table. aliases: their name → their other name for the same tensor (a tied decoder); read only.
    dropped: regular expressions of names that carry nothing we need.
    """

    rows: tuple[Row, ...]
    aliases: Mapping[str, str]
    dropped: tuple[str, ...]


Weights = tuple[Any, Iterator[tuple[str, Tensor]]]  # a configuration, and the tensors under its names


@dataclass(frozen=True)
class Conversion:
    """What a family knows of other layouts (`ModelSpec.convert`).

    is_hf: is this config.json of `transformers` of this family? read_hf: (config.json, tensors, where) → our config
    and tensors. write_hf: (our config, our tensors) → config.json and theirs; ValueError where there is no such layout.
    is_fair, read_fair: the same for what a fair-esm .pt holds.
    """

    is_hf: Callable[[Mapping[str, Any]], bool]
    read_hf: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], Weights]
    write_hf: Callable[[Any, Mapping[str, Tensor]], Weights]
    is_fair: Callable[[Mapping[str, Any]], bool]
    read_fair: Callable[[Mapping[str, Any], str], Weights]


class Renamed(Mapping):
    """A mapping under other names: names[new] is the name in `tensors`."""

    def __init__(self, names: Mapping[str, str], tensors: Mapping[str, Tensor]):
        self.names, self.tensors = names, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def read(layout: Layout, theirs: Mapping[str, Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor). Raises ValueError, before the first tensor, naming every missing or unmapped key."""
    missing = [name for row in layout.rows if not row.optional for name in row.theirs if name not in theirs]
    known = {name for row in layout.rows for name in row.theirs} | set(layout.aliases)
    unmapped = [n for n in theirs if n not in known and not any(re.search(pattern, n) for pattern in layout.dropped)]
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"not known: {_some(unmapped)}"] if unmapped else []
    if problems:
        raise ValueError(f"{where}: the weights are not those of its configuration; {'; '.join(problems)}")
    for alias, name in layout.aliases.items():
        if alias in theirs and not torch.equal(theirs[alias], theirs[name]):
            raise ValueError(f"{where}: {alias} differs from {name}; a decoder that is not tied is not supported")
    for row in layout.rows:
        if all(name in theirs for name in row.theirs):
            yield row.ours, row.merge([theirs[name] for name in row.theirs])


def write(layout: Layout, ours: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields (their name, tensor) for each of our parameters; every one of them must be in the table."""
    unmapped = set(ours) - {row.ours for row in layout.rows}
    if unmapped:
        raise ValueError(f"this layout has no place for: {_some(sorted(unmapped))}")
    for row in layout.rows:
        if row.ours in ours:
            yield from zip(row.theirs, row.split(ours[row.ours]), strict=True)


def _some(names: Sequence[str], count: int = 6) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


# ---------------------------------------------------------------------------------------------- merging and splitting


def merge_heads(num_heads: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """q, k, v, each (N·H, …) → (N·3·H, …) in the order (head, {q, k, v}, H)."""

    def merge(tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack([t.unflatten(0, (num_heads, -1)) for t in tensors], dim=1).flatten(0, 2)

    return merge


def split_heads(num_heads: int) -> Callable[[Tensor], Sequence[Tensor]]:
    """The inverse of merge_heads."""

    def split(tensor: Tensor) -> Sequence[Tensor]:
        return [t.flatten(0, 1).contiguous() for t in tensor.unflatten(0, (num_heads, 3, -1)).unbind(1)]

    return split


def pad_rows(before: int, after: int) -> Callable[[Sequence[Tensor]], Tensor]:
    """Rows of zeros before and after; negative numbers cut. Its inverse is `cut_rows` with the same numbers."""
    return lambda tensors: _pad(tensors[0], before, after)


def cut_rows(before: int, after: int) -> Callable[[Tensor], Sequence[Tensor]]:
    return lambda tensor: (_pad(tensor, -before, -after),)


def _pad(tensor: Tensor, before: int, after: int) -> Tensor:
    flat_dims = [0, 0] * (tensor.dim() - 1)
    return torch.nn.functional.pad(tensor, [*flat_dims, before, after])
