"""What a user looks at after preparing: lengths and letters of a split as numbers and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa


class Statistics:
    """Counts lengths and letters, batch by batch, exactly. names: of the 256 codes, where they are tokens."""

    def __init__(self, names: list[str] | None = None) -> None:
        self._names = names or [chr(code) for code in range(256)]
        self.unit = "tokens" if names else "residues"
        self.lengths = np.zeros(1, dtype=np.int64)  # records by length
        self.letters = np.zeros(256, dtype=np.int64)

    def add(self, sequences: pa.Array) -> None:
        _, offsets, letters = sequences.buffers()
        place = np.frombuffer(offsets, np.int32)[sequences.offset :][: len(sequences) + 1]
        counts = np.bincount(np.diff(place), minlength=len(self.lengths))
        counts[: len(self.lengths)] += self.lengths
        self.lengths = counts
        self.letters += np.bincount(np.frombuffer(letters, np.uint8)[place[0] : place[-1]], minlength=256)

    def summary(self) -> dict[str, Any]:
        total = int(self.lengths.sum())
        cumulative = np.cumsum(self.lengths)
        there = np.flatnonzero(self.lengths)
        longest = int(there[-1])
        edges = [*range(0, 1025, 64)]
        while edges[-1] <= longest:
            edges.append(edges[-1] * 2)
        bins = np.add.reduceat(np.append(self.lengths, np.zeros(edges[-1], np.int64))[: edges[-1]], edges[:-1])
        return {
            "records": total,
            self.unit: int(self.letters.sum()),
            "lengths": {
                "min": int(there[0]),
                "max": longest,
                "mean": round(float(self.letters.sum() / total), 2),
                # the smallest length that at least p % of the records do not exceed
                **{f"p{p}": int(np.searchsorted(cumulative, total * p / 100)) for p in (1, 5, 25, 50, 75, 95, 99)},
                "histogram": {"edges": edges, "counts": bins.tolist()},
            },
            "alphabet": {self._names[c]: int(self.letters[c]) for c in np.argsort(-self.letters) if self.letters[c]},
        }


def draw_lengths(path: Path, splits: dict[str, Statistics]) -> None:
    """A picture of the lengths of each split; those beyond the 99.5th percentile share the last bar."""
    from matplotlib.figure import Figure  # half a second to import: not for everyone who reads a store

    longest = max(len(s.lengths) for s in splits.values())
    total = np.sum([np.pad(s.lengths, (0, longest - len(s.lengths))) for s in splits.values()], axis=0)
    end = int(np.searchsorted(np.cumsum(total), 0.995 * total.sum())) + 1
    figure = Figure(figsize=(8, 2.6 * len(splits)), layout="constrained")
    rows = figure.subplots(len(splits), squeeze=False)[:, 0]
    for axes, (name, statistics) in zip(rows, splits.items()):
        lengths = np.flatnonzero(statistics.lengths)
        axes.hist(np.minimum(lengths, end), bins=min(60, end), range=(0, end), weights=statistics.lengths[lengths])
        title = f"{name}: {statistics.lengths.sum():,} records, {statistics.letters.sum():,} {statistics.unit}"
        axes.set_title(title, loc="left")
        axes.set(xlabel=f"{statistics.unit}; the last bar holds all from {end}", ylabel="records")
    figure.savefig(path, dpi=120)
