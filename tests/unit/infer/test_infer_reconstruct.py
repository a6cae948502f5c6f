"""Reconstruction counts what a decoder gets wrong: tokens out of place, molecules, and those that are none."""

from types import SimpleNamespace

import pytest
import torch

from moltron.config.schema import ObjectiveConfig
from moltron.data.store import Clusters, Store, StoreWriter
from moltron.infer.reconstruct import Reconstruction
from moltron.objectives import Limits
from moltron.tokenizers import get_tokenizer

pytest.importorskip("rdkit", reason="rdkit is not installed: pip install moltron[molecules]")
TOKENIZER = get_tokenizer("megamolbart")
SMILES = ["CCO", "CC(=O)O", "c1ccccc1", "CCN", "O"]
WRITES = {  # in place of what is read; None: never ends
    "CCO": "CCN",  # one token wrong of 3 and the end
    "CC(=O)O": "CC(=O",  # 5 of 8 right, and no molecule
    "CCN": None,  # all right but the end
}


class Copies(torch.nn.Module):
    """An encoder–decoder that writes what it reads, but for `WRITES`."""

    def encode(self, batch):
        return batch.ids

    def start(self, memory_T, layout, capacity, num_sequences):
        texts = [TOKENIZER.decode(ids) for ids in memory_T.split(list(layout.lengths))[:num_sequences]]
        rows = []
        for text in texts:
            written = WRITES.get(text, text)
            ids = TOKENIZER.encode(text if written is None else written).tolist()
            rows.append(ids + [ids[-1] if written is None else TOKENIZER.eos_id] * capacity)
        return SimpleNamespace(rows=rows, used=0, select=None)

    def step(self, ids_B, cache):
        cache.used += 1
        wanted = torch.tensor([row[cache.used - 1] for row in cache.rows])
        return torch.nn.functional.one_hot(wanted, TOKENIZER.vocab_size).float()


@pytest.fixture
def store(tmp_path):
    with StoreWriter(tmp_path / "val.arrow", "molecule", tokens=True) as writer:
        writer.add([f"m{i}" for i in range(5)], SMILES, [TOKENIZER.codes(s.encode()) for s in SMILES])
    Clusters.save_equal(tmp_path / "val.arrow", 5, 1)
    return Store.open(tmp_path / "val.arrow")


def shares(store, molecules, tokens=64):
    settings = dict(tokens=tokens, limits=Limits(32, 32), molecules=molecules)
    objective = ObjectiveConfig(name="denoising", mask_prob=0.9)  # nothing is masked here all the same
    return Reconstruction(store, TOKENIZER, objective, torch.device("cpu"), **settings).shares(Copies())


def test_every_error_is_counted(store, monkeypatch):
    monkeypatch.setattr("moltron.infer.generate.CHECK_EVERY", 99)  # the stand-in drops no rows
    assert shares(store, 1000) == {
        "token_accuracy": (3 + 5 + 9 + 3 + 2) / (4 + 8 + 9 + 4 + 2),
        "exact_accuracy": 2 / 5,
        "invalid": 2 / 5,
    }


def test_whole_packs_until_there_are_enough(store, monkeypatch):
    monkeypatch.setattr("moltron.infer.generate.CHECK_EVERY", 99)
    found = shares(store, 1, tokens=32)  # all fit one pack
    assert found["exact_accuracy"] == 2 / 5
