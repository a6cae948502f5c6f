"""moltron prepare kind=molecule: canonical SMILES, variants, tokens; the same for any number of processes."""

import csv
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from moltron.common.manifest import sha256_file
from moltron.config.schema import PrepareConfig
from moltron.data.prepare import molecules, prepare
from moltron.data.store import Store
from moltron.tokenizers import get_tokenizer

Chem = pytest.importorskip("rdkit.Chem")
ZINC = Path(__file__).parents[4] / "shared" / "data" / "chem" / "zinc15_tranche_sample"
# heptanol and longer, with a ring: some canonical spellings and some that are not
CHAINS = [f"{'C' * n}O" for n in range(1, 20)] + [f"OCC1CC{'C' * n}C1" for n in range(1, 20)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(molecules, "CHUNK", 3)
    monkeypatch.setattr("moltron.data.prepare.run.CHUNK", 3)
    monkeypatch.setattr("moltron.data.prepare.spool.CHUNK", 3)
    monkeypatch.setattr("moltron.data.prepare.run._BATCH_ROWS", 20)
    monkeypatch.setattr("moltron.data.prepare.spool._BATCH_ROWS", 7)


def smi(path: Path, lines) -> str:
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def run(tmp_path, lines, name="out", **options):
    options = {"workers": 1, **options}
    source = smi(tmp_path / "in.smi", lines)
    output = tmp_path / name
    return output, prepare(PrepareConfig(input=source, output=str(output), kind="molecule", **options))


def rows(folder, split="train") -> list[tuple[str, str]]:
    store = Store.open(Path(folder) / f"{split}.arrow")
    return list(zip(store.ids(range(len(store))), store.texts(range(len(store)))))


def rejects(folder) -> list[tuple[str, str, str]]:
    with open(Path(folder) / "rejects.tsv", newline="") as file:
        return [(row["line"], row["id"], row["reason"]) for row in csv.DictReader(file, delimiter="\t")]


def test_a_molecule_is_a_cluster_of_one_canonical_and_k_random_smiles(tmp_path):
    output, manifest = run(tmp_path, CHAINS, variants=5, val_size=6, test_size=4)
    canonical = {Chem.CanonSmiles(smiles) for smiles in CHAINS}
    tokenizer, seen = get_tokenizer("megamolbart"), set()
    for split, count in (("train", 28), ("val", 6), ("test", 4)):
        store, entry = Store.open(output / f"{split}.arrow"), manifest["splits"][split]
        assert store.alphabet == "molecule" and store.has_tokens and len(store) == 6 * count == entry["records"]
        assert entry["clusters"] == count and entry["tokens"] == store.lengths.sum() == sum(entry["alphabet"].values())
        assert len(store.clusters) == count and np.array_equal(store.clusters.order, np.arange(len(store)))
        assert np.array_equal(store.clusters.start, 6 * np.arange(count)) and set(store.clusters.count) == {6}
        assert set(entry["files"]) == {
            f"{split}.arrow",
            *(f"{split}.clusters.{x}.npy" for x in ("start", "count", "order")),
        }
        table = pa.ipc.open_file(str(output / f"{split}.arrow")).read_all()
        for first in store.clusters.start.tolist():
            texts = store.texts(range(first, first + 6))
            assert len(set(store.ids(range(first, first + 6)))) == 1
            assert {Chem.CanonSmiles(text) for text in texts} == {texts[0]} and texts[0] in canonical
            seen.add(texts[0])
            for row, text in enumerate(texts, first):
                codes = store.gather(np.array([row]), np.array([0]), store.lengths[[row]])
                assert codes.tobytes() == tokenizer.codes(text.encode()) == table["tokens"][row].as_py()
    assert seen == canonical
    assert len({text for _, text in rows(output)}) > 28 * 3  # so the variants vary
    assert manifest["tokenizer"] == "megamolbart" and manifest["records"]["kept"] == 38


def test_any_number_of_processes_gives_the_same_files(tmp_path):
    files = {}
    for workers in (1, 2, 3):
        output, _ = run(tmp_path, [*CHAINS, "nonsense x", "C" * 200], f"out{workers}", workers=workers, val_size=5)
        files[workers] = {f.name: sha256_file(f) for f in output.iterdir() if f.suffix in (".arrow", ".npy", ".tsv")}
    assert len(files[1]) == 13 and files[1] == files[2] == files[3]


def test_variants_are_of_seed_and_id_and_k(tmp_path):
    lines = [f"{smiles} m{i}" for i, smiles in enumerate(CHAINS)]
    eight, _ = run(tmp_path, lines, "eight")
    again, _ = run(tmp_path, lines[::-1], "again")  # another order, the same variants
    assert sorted(rows(eight)) == sorted(rows(again))
    three, _ = run(tmp_path, lines, "three", variants=3)
    kept = [row for index, row in enumerate(rows(eight)) if index % 9 < 4]
    assert rows(three) == kept  # fewer of the same
    other, _ = run(tmp_path, lines, "other", seed=1)
    assert rows(other)[::9] == rows(eight)[::9] and rows(other) != rows(eight)


def test_without_variants(tmp_path):
    output, manifest = run(tmp_path, ["OCC a", "c1ccccc1 b"], variants=0)
    assert rows(output) == [("a", "CCO"), ("b", "c1ccccc1")]
    assert Store.open(output / "train.arrow").clusters is None and "clusters" not in manifest["splits"]["train"]
    assert Store.open(output / "train.arrow").lengths.tolist() == [3, 8]


def test_what_rdkit_would_take_for_a_name_is_no_smiles(tmp_path):
    (tmp_path / "m.csv").write_text("id,smiles\na,CCO\nb,CC O\nc,CC\u041e\nd, CCN \n", encoding="utf-8")
    config = PrepareConfig(input=str(tmp_path / "m.csv"), output=str(tmp_path / "out"), variants=0, workers=1)
    prepare(config)
    assert rows(tmp_path / "out") == [("a", "CCO"), ("d", "CCN")]
    space, ascii = "white space inside the SMILES", "a SMILES is ASCII, this one is not"
    assert sorted(rejects(tmp_path / "out")) == [("3", "b", space), ("4", "c", ascii)]


def test_rejects_have_their_line(tmp_path):
    lines = [
        "OCC a",
        "C(C)O b",
        "nonsense c",
        "C1CC d",
        "[U] e",
        f"{'C' * 128} f",
        f"{'C' * 127} g",
        "C h",
        "[Pu].CC i",
    ]
    output, manifest = run(tmp_path, lines, variants=0, min_length=2)
    assert rows(output) == [("a", "CCO"), ("g", "C" * 127), ("i", "CC.[Pu]")]
    assert sorted(rejects(output)) == [
        ("2", "b", "sequence equal to an earlier one"),
        ("3", "c", "RDKit cannot read this SMILES"),
        ("4", "d", "RDKit cannot read this SMILES"),
        ("5", "e", "none of its tokens is in the vocabulary"),
        ("6", "f", "longer than max_length=127"),
        ("8", "h", "shorter than min_length=2"),
    ]
    assert manifest["cleaning"]["unknown_tokens"] == 2  # [U], [Pu]
    assert manifest["splits"]["train"]["alphabet"]["?"] == 1


def test_lengths_are_tokens_not_letters(tmp_path):
    output, _ = run(tmp_path, ["C[C@H](N)C(=O)O a", "CCCCCCCCCCCCCC b"], variants=0, max_length=12)
    assert [name for name, _ in rows(output)] == ["a"]  # 12 tokens, 16 letters


def test_a_variant_is_never_longer_than_max_length(tmp_path):
    spiro = "C[C@H](N)C(=O)N1CCC[C@H]1C(=O)O"
    length = len(get_tokenizer("megamolbart").codes(Chem.CanonSmiles(spiro).encode()))
    output, manifest = run(tmp_path, [spiro], max_length=length, variants=30)
    assert Store.open(output / "train.arrow").lengths.max() == length
    assert manifest["cleaning"]["variants_too_long"] > 0


def test_properties_and_salts(tmp_path):
    lines = ["CCO a", "CCCCCCCCCCCC b", "[Na+].CC(=O)[O-] c", "O=C(O)CC.O d"]
    output, _ = run(tmp_path, lines, "logp", variants=0, max_logp=3)
    assert rejects(output) == [("2", "b", "logP above max_logp=3")]
    output, _ = run(tmp_path, lines, "weight", variants=0, max_weight=100)
    assert rejects(output) == [("2", "b", "heavier than max_weight=100")]
    assert dict(rows(output))["c"] == "CC(=O)[O-].[Na+]"
    output, manifest = run(tmp_path, lines, "salts", variants=0, salts="strip")
    assert dict(rows(output))["c"] == "CC(=O)[O-]" and dict(rows(output))["d"] == "CCC(=O)O"
    assert manifest["cleaning"] == {"salts_stripped": 2, "records": 2}


def test_settings_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="variants=-1 >= 0"):
        run(tmp_path, ["CCO a"], variants=-1)
    with pytest.raises(ValueError, match="salts=lose: choose from keep, strip"):
        run(tmp_path, ["CCO a"], salts="lose")
    with pytest.raises(ValueError, match="workers=0 >= 1"):
        run(tmp_path, ["CCO a"], workers=0)
    (tmp_path / "c.tsv").write_text("a\ta\n")
    with pytest.raises(ValueError, match="with clusters or mapping set variants=0"):
        run(tmp_path, ["CCO a"], clusters=str(tmp_path / "c.tsv"))
    output, _ = run(tmp_path, ["CCO a"], clusters=str(tmp_path / "c.tsv"), variants=0)
    assert len(Store.open(output / "train.arrow").clusters) == 1
    (tmp_path / "p.fasta").write_text(">a\nMKT\n")
    with pytest.raises(ValueError, match=r"salts=strip, max_weight=5.0: for molecules"):
        config = PrepareConfig(
            input=str(tmp_path / "p.fasta"), output=str(tmp_path / "p"), salts="strip", max_weight=5.0
        )
        prepare(config)


def test_a_molecule_that_rdkit_fails_on_is_a_reject_or_its_own_variant(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("Pre-condition Violation")

    monkeypatch.setattr(Chem, "MolToRandomSmilesVect", fail)
    output, manifest = run(tmp_path, ["OCC a"], variants=2)
    assert rows(output) == [("a", "CCO")] * 3 and manifest["cleaning"]["variants_failed"] == 2
    original = Chem.MolToSmiles
    monkeypatch.setattr(Chem, "MolToSmiles", lambda m: fail() if m.GetNumAtoms() == 1 else original(m))
    output, _ = run(tmp_path, ["OCC a", "C b"], "two")
    assert rejects(output) == [("2", "b", "RDKit fails on this molecule (RuntimeError)")]


def _die(*_):
    os._exit(9)


def test_a_killed_worker_is_an_error_not_a_wait(tmp_path):
    with pytest.raises(ValueError, match="worker processes was killed"), molecules.Workers(2) as workers:
        list(workers.map(_die, ((i, i) for i in range(5)), None))


def test_few_chunks_are_in_memory(tmp_path):
    drawn = 0

    def tasks():
        nonlocal drawn
        for drawn in range(100):
            yield drawn, [b"CCO"]

    with molecules.Workers(2) as workers:
        for kept, (found,) in workers.map(molecules.canonicalize, tasks(), PrepareConfig()):
            assert found.smiles == b"CCO" and drawn <= kept + 6
    assert drawn == 99


@pytest.mark.skipif(not ZINC.exists(), reason="needs ../shared/data")
def test_zinc15_tranches_as_downloaded(tmp_path):
    config = PrepareConfig(input=str(ZINC / "KAED.txt.gz"), output=str(tmp_path / "zinc"), variants=1, val_size=5)
    manifest = prepare(config)
    assert manifest["kind"] == "molecule" and manifest["splits"]["val"]["clusters"] == 5
    assert all(name.isdigit() for name, _ in rows(tmp_path / "zinc"))  # the column zinc_id
