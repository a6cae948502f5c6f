"""Two-way tables between our parameter names and another layout's, and the walk over such a table.

    other layout's tensors ──read──> (our name, tensor) …          our tensors ──write──> {their name: tensor}

Tensors are read one at a time, so that a big model is never in memory twice. Knows nothing of files or families.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

log = logging.getLogger(__name__)
NEUTRAL = {  # fields of any config.json of `transformers` that change nothing for us
    "_name_or_path", "architectures", "dtype", "gradient_checkpointing", "id2label", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "problem_type", "return_dict", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip
Weights = tuple[Any, Iterable[tuple[str, Tensor]]]  # a configuration, and the tensors under its names


def never(_: Mapping[str, Any]) -> bool:
    return False


def unreadable(*_: Any) -> NoReturn:
    raise AssertionError("a layout that is never recognised is not read")


@dataclass(frozen=True)
class Conversion:
    """What a family knows of other layouts (`ModelSpec.convert`); those left out it does not have.

    is_hf, is_fair: is this config.json of `transformers`, what this fair-esm .pt holds, of this family?
    read_hf, read_fair: (config.json, tensors, where), (what the .pt holds, where) → our config and tensors.
    write_hf: (our config, our tensors) → config.json and theirs; ValueError where there is no such layout.
    """

    write_hf: Callable[[Any, Mapping[str, Tensor]], tuple[dict[str, Any], dict[str, Tensor]]]
    is_hf: Callable[[Mapping[str, Any]], bool] = never
    read_hf: Callable[[Mapping[str, Any], Mapping[str, Tensor], str], Weights] = unreadable
    is_fair: Callable[[Mapping[str, Any]], bool] = never
    read_fair: Callable[[Mapping[str, Any], str], Weights] = unreadable


class Change(NamedTuple):
    """How a parameter of ours comes of one or more tensors of theirs, and the way back."""

    merge: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor]]


SAME = Change(lambda theirs: theirs[0], lambda ours: [ours])


def heads(num: int, parts: int = 3) -> Change:
    """q, k, v, each (N·H, …) ↔ (N·3·H, …) in the order (head, {q, k, v}, H); parts=2: of k and v."""
    return Change(
        lambda theirs: torch.stack([t.unflatten(0, (num, -1)) for t in theirs], dim=1).flatten(0, 2),
        lambda ours: [t.flatten(0, 1) for t in ours.unflatten(0, (num, parts, -1)).unbind(1)],
    )


def pad_rows(before: int, after: int) -> Change:
    """Rows of zeros before and after, in a fresh tensor; negative numbers cut. The way back cuts what this pads."""

    def pad(tensor: Tensor, sign: int) -> Tensor:
        rows = [sign * before, sign * after]
        return torch.nn.functional.pad(tensor, [0, 0] * (tensor.dim() - 1) + rows)

    return Change(lambda theirs: pad(theirs[0], 1), lambda ours: [pad(ours, -1)])


class Row(NamedTuple):
    ours: str
    theirs: tuple[str, ...]
    change: Change = SAME


def read(rows: Sequence[Row], theirs: Mapping[str, Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
    """Yields (our name, tensor). Raises ValueError, before the first tensor, naming every unmapped key and every one
    that is missing beside others of its row. Whether all of a model's parameters came is for the caller to see.
    """
    rows = [row for row in rows if any(name in theirs for name in row.theirs)]
    named = [name for row in rows for name in row.theirs]
    missing, unmapped = [n for n in named if n not in theirs], [n for n in theirs if n not in named]
    if missing or unmapped:
        problems = f"missing: {_some(missing)}; not known: {_some(unmapped)}"
        raise ValueError(f"{where}: the weights are not those of its configuration; {problems}")
    for row in rows:
        yield row.ours, row.change.merge([theirs[name] for name in row.theirs])


def write(rows: Sequence[Row], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters under their names; every one of them must be in the table."""
    table, theirs = {row.ours: row for row in rows}, {}
    for name, tensor in ours.items():
        theirs.update(zip(table[name].theirs, table[name].change.split(tensor), strict=True))
    return theirs


def read_config(
    theirs: Mapping[str, Any],
    where: str,
    *,
    fields: Mapping[str, tuple[str, Any]],
    required: Mapping[str, tuple],
    needed: Collection[str],
    off: Collection[str],
    dropouts: Collection[str],
    neutral: Collection[str],
) -> dict[str, Any]:
    """Our fields of a config.json. Each of theirs is honoured, known to change nothing, or refused by name.

    fields: our field ← theirs, and the value where the file does not say. required: the values that a field may have;
    needed: fields that must be there; off: those that must be false; dropouts: those that training does without;
    neutral: all others that are understood. Raises ValueError naming all problems.
    """
    problems = [
        f"{name}={theirs[name]!r} is supported only as {values[0]!r}"
        for name, values in required.items()
        if name in theirs and theirs[name] not in values
    ]
    problems += [f"{name} is missing" for name in needed if name not in theirs]
    problems += [f"{name}={theirs[name]!r} is not supported" for name in sorted(off) if theirs.get(name)]
    known = {name for name, _ in fields.values()}
    unknown = set(theirs).difference(known, required, off, dropouts, neutral, NEUTRAL)
    problems += [f"{name}={theirs[name]!r} is not a known field" for name in sorted(unknown)]
    if problems:
        raise ValueError(f"{where}/config.json: {'; '.join(problems)}")
    if active := [name for name in dropouts if theirs.get(name)]:
        log.info("%s: %s not applied in training: moltron's models have no dropout", where, ", ".join(active))
    return {ours: theirs.get(name, default) for ours, (name, default) in fields.items()}


def _some(names: Sequence[str], count: int = 6) -> str:
    return (", ".join(names[:count]) or "none") + (f" and {len(names) - count} more" if len(names) > count else "")
