"""The model that comes with the project loads, and its embeddings know families."""

import sys
from pathlib import Path

import numpy as np

from moltron import load_model
from moltron.models.spec import num_parameters

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "protein"))
FOLDER = ROOT / "models" / "esm2_8M_moltron"


def test_embeddings_know_families_better_than_composition_does():
    from embedding_map import composition, nearest_neighbour_accuracy

    fasta = ROOT / "examples" / "data" / "proteins.fasta"
    records = [record.split("\n") for record in fasta.read_text().split(">")[1:]]
    chosen = [r for r in records if len(r[1]) <= 200][:120]
    ids = [header.split()[0] for header, *_ in chosen]
    families = np.array([header.partition("family=")[2] for header, *_ in chosen])
    assert len(ids) == 120 and len(set(families)) >= 2
    model = load_model(FOLDER)
    accuracy = nearest_neighbour_accuracy(model.embed([sequence for _, sequence, *_ in chosen]), families)
    assert accuracy >= 0.99 and accuracy >= nearest_neighbour_accuracy(composition(str(fasta), ids), families)


def test_model_card_says_what_the_weights_are():
    card = (FOLDER / "README.md").read_text()
    assert f"{num_parameters(load_model(FOLDER).encoder.model):,}" in card
    assert all(word in card for word in ("## Limits", "## Licence", "perplexity"))
