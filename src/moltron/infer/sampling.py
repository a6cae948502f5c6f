"""The ways to new molecules from given ones: which noise, how many copies, how they are decoded (spec
tasks_and_inference.md §5), and the line between two of them.

    hiddens of a record ──copies, + radius · normal──> Decoding ──Generator──> hypotheses, the best `kept` of each copy

Knows nothing of models and text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moltron.infer.generate import Decoding

METHODS: tuple[str, ...] = (
    "greedy-perturbate",
    "topkp-perturbate",
    "beam-search-perturbate",
    "beam-search-single-sample",
    "beam-search-perturbate-sample",
)


@dataclass(frozen=True)
class Sampling:
    """method: one of METHODS.

    greedy-perturbate: num_samples noisy copies, the likeliest tokens; topkp-perturbate: tokens drawn within top_k and
    top_p; beam-search-perturbate: the best of beam_size beams of each noisy copy; beam-search-single-sample: one noisy
    copy, all of num_samples beams; beam-search-perturbate-sample: num_samples noisy copies, all beams of each.
    scaled_radius: standard deviation of the noise; 0: none. Results are a function of these values, the seed and a
    record's number, not of what else is generated.
    """

    method: str = "greedy-perturbate"
    num_samples: int = 10
    scaled_radius: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    temperature: float = 1.0
    beam_size: int = 5
    length_penalty: float = 0.0
    max_tokens: int | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        """What cannot work, as sentences."""
        if self.method not in METHODS:
            return [f"method={self.method} is unknown; there are: {', '.join(METHODS)}"]
        few = [f"num_samples={self.num_samples} must be at least 1"] if self.num_samples < 1 else []
        return few + self.decoding.problems()

    @property
    def copies(self) -> int:
        """Decodings of each record."""
        return 1 if self.method == "beam-search-single-sample" else self.num_samples

    @property
    def kept(self) -> int:
        """Hypotheses of each decoding that are results."""
        return 1 if self.method == METHODS[2] else self.decoding.beams

    @property
    def decoding(self) -> Decoding:
        beams = dict(zip(METHODS[2:], (self.beam_size, self.num_samples, self.beam_size))).get(self.method, 1)
        common: Any = dict(max_tokens=self.max_tokens, radius=self.scaled_radius, seed=self.seed)
        if self.method == "topkp-perturbate":
            common |= dict(sample=True, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        return Decoding(beams, length_penalty=self.length_penalty, **common)

    def keys(self, records: np.ndarray) -> np.ndarray:
        """(N,) numbers of records → (N · copies,) names of their draws."""
        return (records[:, None] * 2**20 + np.arange(self.copies)).ravel()


def interpolate(first_LD: np.ndarray, second_LD: np.ndarray, count: int) -> list[np.ndarray]:
    """`count` points between two records' hidden states, linear, α = i / (count + 1), the ends left out.

    Of unequal lengths: each as long as the longer one, whose own rows stand past the shorter one's end.
    """
    short, long = sorted((first_LD, second_LD), key=len)
    whole = np.concatenate([short, long[len(short) :]])
    a, b = (whole, long) if short is first_LD else (long, whole)
    return [a + (b - a) * np.float32(i / (count + 1)) for i in range(1, count + 1)]
