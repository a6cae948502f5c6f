"""Learning rates as pure functions of the step: nothing to save, nothing to restore.

    ScheduleConfig ──build_schedule──> lr(step), step counted from 1: the rate of that optimizer step

Formulas are those of BioNeMo v1 (spec models.md §5), where s is the scheduler's step; here s is the number of the
optimizer step itself, so the first step of a warm-up is not lost to a rate of 0. Each takes what it reads of the keys
that all are given. Knows nothing of optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from moltron.config.schema import ScheduleConfig

Schedule = Callable[[int], float]

DECAYING = ("cosine", "linear", "warmup_anneal_hold")  # whose rates depend on where the decay ends


def build_schedule(config: ScheduleConfig, lr: float, max_steps: int, hidden_size: int) -> Schedule:
    """lr: the peak, for `noam` its factor; `config.decay_steps` or else `max_steps` ends the decay.

    hidden_size: the model's width, only read by `noam`. Raises ValueError for an unknown name.
    """
    if config.name not in NAMES:
        raise ValueError(f"optim.schedule.name={config.name} is unknown: choose one of {', '.join(NAMES)}")
    shape = dict(warmup=config.warmup_steps, hold=config.constant_steps, end=config.decay_steps or max_steps)
    return partial(SCHEDULES[config.name], lr=lr, low=config.min_lr, hidden_size=hidden_size, **shape)


def peak(config: ScheduleConfig, schedule: Schedule) -> float:
    """The highest rate that `schedule` reaches: the one at the end of the warm-up."""
    return schedule(max(config.warmup_steps, 1))


def cosine(s: int, lr: float, warmup: int, hold: int, end: int, low: float, **_: Any) -> float:
    """CosineAnnealing: up to `lr`, half a cosine down to `low` at `end` - `hold`, then `low`."""
    if s < warmup:
        return lr * s / warmup
    last = end - hold
    if s >= last:
        return low if last > warmup else lr
    return low + (lr - low) * 0.5 * (1 + math.cos(math.pi * (s - warmup) / (last - warmup)))


def linear(s: int, lr: float, warmup: int, end: int, low: float, **_: Any) -> float:
    """WarmupAnnealing: up to `lr` (s + 1 of warmup + 1), then a straight line down to `low` at `end`."""
    if s <= warmup:
        return lr * (s + 1) / (warmup + 1)
    return low + (lr - low) * max(end - s, 0) / (end - warmup) if end > warmup else low


def warmup_anneal_hold(s: int, lr: float, warmup: int, end: int, low: float, **_: Any) -> float:
    """WarmupAnnealDecayHold of v1.11's ESM-2: `low` to `lr`, a line that aims at 0 at `end`, held at `low`."""
    if s < warmup:
        return low + (lr - low) * s / warmup
    return max(lr * (1 - (s - warmup) / (end - warmup)), low) if end > warmup else lr


def noam(s: int, lr: float, warmup: int, low: float, hidden_size: int, **_: Any) -> float:
    """Noam: lr · d^-½ · min(s^-½, s · warmup^-1.5), not below `low` after the warm-up."""
    s = max(s, 1)
    if s <= warmup:
        return lr * hidden_size**-0.5 * s * warmup**-1.5
    return max(lr * hidden_size**-0.5 * s**-0.5, low)


def inverse_sqrt(s: int, lr: float, warmup: int, low: float, **_: Any) -> float:
    """InverseSquareRoot: up to `lr` in a line, then lr · √((warmup + 1) / (s + 1)), not below `low`."""
    if s <= warmup:
        return lr * (s + 1) / (warmup + 1)
    return max(lr * math.sqrt((warmup + 1) / (s + 1)), low)


def constant(s: int, lr: float, warmup: int, **_: Any) -> float:
    """Up to `lr` in a line, then `lr`."""
    return lr * min(s / warmup, 1.0) if warmup else lr


SCHEDULES = {f.__name__: f for f in (cosine, linear, warmup_anneal_hold, noam, inverse_sqrt, constant)}
NAMES = tuple(SCHEDULES)
