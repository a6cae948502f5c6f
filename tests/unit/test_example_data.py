"""The proteins that ship with the project: complete, clean, of the families they claim, and sampled from the corpus."""

import csv
import importlib.util
import lzma
import re
import sys
from collections import Counter
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT / "examples/data"
CORPUS = ROOT.parent / "shared/data/protein/corpus/swissprot_2014_01_go.fasta.xz"


@pytest.fixture(scope="module")
def script():
    loader = SourceFileLoader("make_example_data", str(ROOT / "scripts/make_example_data"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name

    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def proteins() -> dict[str, tuple[str, str]]:
    lines = (DATA / "proteins.fasta").read_text().splitlines()
    headers = [line[1:].split(" family=") for line in lines[::2]]
    return {name: (family, sequence) for (name, family), sequence in zip(headers, lines[1::2], strict=True)}


def test_table_and_fasta_agree(proteins):
    with open(DATA / "families.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["family"], int(row["length"])) for row in rows] == [
        (name, family, len(sequence)) for name, (family, sequence) in proteins.items()
    ]


def test_families_are_many_balanced_and_as_the_readme_counts(proteins):
    counts = Counter(family for family, _ in proteins.values())
    assert len(counts) == 12 and min(counts.values()) >= 60 and max(counts.values()) <= 120
    text = (DATA / "README.md").read_text()
    assert f"{len(proteins)} proteins" in text
    assert f"{sum(len(sequence) for _, sequence in proteins.values()):,} residues" in text
    for family, count in counts.items():
        assert re.search(rf"^\| {family} \|.*\| {count} \|", text, re.MULTILINE), family


def test_sequences_are_clean_and_match_their_signature(proteins, script):
    signatures = {family.name: family.signature for family in script.FAMILIES}
    assert len({sequence for _, sequence in proteins.values()}) == len(proteins)
    for name, (family, sequence) in proteins.items():
        assert re.fullmatch("[ACDEFGHIKLMNPQRSTVWYXBUZO]{50,1022}", sequence), name
        assert re.search(signatures[family], sequence), name
    for family in script.FAMILIES:
        assert any(proteins.get(seed, ("", ""))[0] == family.name for seed in family.seeds), family.name


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.exists(), reason="needs ../shared/data")
def test_every_sequence_is_the_corpus_own(proteins):
    corpus = {}
    with lzma.open(CORPUS, "rt") as file:
        for header in file:
            corpus.update(dict.fromkeys(re.findall(r"[A-Z0-9]+", header), next(file).strip()))
    assert all(corpus[name] == sequence for name, (_, sequence) in proteins.items())
