"""Look at embeddings: a 2-D map coloured by family, and how often the nearest neighbour is of the same family.

    python examples/protein/embedding_map.py embeddings.npz families.csv map.png [proteins.fasta]

embeddings.npz is what `moltron embed output=embeddings.npz` wrote; families.csv has the columns `id` and `family`.
Prints one JSON object. With the proteins, their amino-acid composition (the mean of one-hot vectors, which knows
nothing of order) is measured beside the embeddings.
"""

from __future__ import annotations

import csv
import json
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"


def nearest_neighbour_accuracy(vectors: np.ndarray, families: np.ndarray) -> float:
    """Share of proteins whose nearest other protein (cosine distance) is of their own family."""
    scaled = StandardScaler().fit_transform(vectors)
    _, neighbours = NearestNeighbors(n_neighbors=2, metric="cosine").fit(scaled).kneighbors(scaled)
    other = np.where(neighbours[:, 0] == np.arange(len(scaled)), neighbours[:, 1], neighbours[:, 0])
    return float((families[other] == families).mean())


def composition(fasta: str, ids: list[str]) -> np.ndarray:
    """(N, 20) share of each amino acid."""
    with open(fasta) as file:
        records = (record.partition("\n") for record in file.read().split(">")[1:])
        sequences = {header.split()[0]: "".join(lines.split()) for header, _, lines in records}
    return np.array([[sequences[i].count(a) / max(len(sequences[i]), 1) for a in AMINO_ACIDS] for i in ids])


def draw(vectors: np.ndarray, families: np.ndarray, path: str) -> None:
    scaled = StandardScaler().fit_transform(vectors)
    xy = TSNE(perplexity=min(30, len(scaled) / 4), init="pca", random_state=0).fit_transform(scaled)
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    colours = plt.get_cmap("tab20")
    for i, family in enumerate(sorted(set(families))):
        chosen = families == family
        label = f"{family} ({chosen.sum()})"
        axes.scatter(*xy[chosen].T, s=14, color=colours(i % 20), label=label, edgecolors="white", linewidths=0.3)
    axes.set(title="Protein embeddings by family (t-SNE)", xticks=[], yticks=[])
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=150)


def main(embeddings: str, table: str, picture: str, fasta: str = "") -> None:
    data = np.load(embeddings)
    with open(table, newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    ids = [str(i) for i in data["ids"]]
    families = np.array([rows[i]["family"] for i in ids])
    report = {"proteins": len(ids), "families": len(set(families))}
    report["nearest_neighbour_accuracy"] = round(nearest_neighbour_accuracy(data["embeddings"], families), 4)
    if fasta:
        of_composition = nearest_neighbour_accuracy(composition(fasta, ids), families)
        report["nearest_neighbour_accuracy_of_composition"] = round(of_composition, 4)
    draw(data["embeddings"], families, picture)
    print(json.dumps(report))


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
