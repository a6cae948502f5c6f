"""A tiny ESM-2 on disk and FASTA files for the tests of this room."""

import pytest

from moltron.checkpoint.weights import save_pretrained
from moltron.models.registry import build_model, get_spec

ARCHITECTURE = dict(hidden_size=48, num_layers=2, num_heads=4, ffn_size=96, max_positions=66)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """Width 48, 2 layers, up to 64 residues."""
    model = build_model("esm2", ARCHITECTURE, "cpu")
    model.init_weights(0)
    return str(save_pretrained(model, get_spec("esm2"), model.config, tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def fasta(tmp_path):
    """Writes (id, sequence) pairs as FASTA; returns the path."""

    def write(records, name: str = "input.fasta") -> str:
        path = tmp_path / name
        path.write_text("".join(f">{record_id} some words\n{sequence}\n" for record_id, sequence in records))
        return str(path)

    return write
