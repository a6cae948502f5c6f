"""MegaMolBART's 523 ids and its splitting of SMILES, against the published ones."""

import hashlib
import importlib.util
import lzma
import re
from pathlib import Path

import numpy as np
import pytest

from moltron.tokenizers import get_tokenizer
from moltron.tokenizers.smiles import _TOKEN

SHARED = Path(__file__).parents[4] / "shared" / "data" / "chem" / "smiles_diverse.tsv.xz"
VOCABULARY = "600888bfc7f9386f47aa148443e68f52"  # MD5 of bart_vocab.txt, Chemformer's repository and PyPI's alike
PUBLISHED = (  # molbart/build_tokeniser.py, DEFAULT regex
    "\\[[^\\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\\(|\\)|\\.|=|#|-|\\+|\\\\|\\/|:|~|@|\\?|>|\\*|\\$|\\%[0-9]{2}|[0-9]"
)
SMILES = [
    "CC(C)Cc1ccc(cc1)[C@@H](C)C(=O)O",
    r"F/C=C\F",
    "[Na+].[Cl-]",
    "BrC%10CCCC%10Cl",
    "C[13CH3]",
    "O=[N+]([O-])c1cc[nH]c1",
    "[Unknown]",
    "C^&<MASK>?",
    "[C",
    "",
    "é",
]


def test_vocabulary_is_the_published_one():
    tokenizer = get_tokenizer("megamolbart")
    assert tokenizer.vocab_size == 523 == len(set(tokenizer.pieces))
    assert hashlib.md5(("\n".join(tokenizer.pieces) + "\n").encode()).hexdigest() == VOCABULARY
    # a few written out, specification models.md §3
    fixed = {"<PAD>": 0, "?": 1, "^": 2, "&": 3, "<MASK>": 4, "<SEP>": 5, "C": 272, "c": 273, "1": 274, "(": 275}
    assert {piece: tokenizer.pieces.index(piece) for piece in fixed} == fixed
    assert tokenizer.pieces[6] == "LogD_change_(-0.1, 0.1]" and tokenizer.pieces[65] == "LogD_change_(-inf, -5.7]"
    assert tokenizer.pieces[66:72:3] == ["Solubility_low->high", "Clint_low->high"]
    assert tokenizer.pieces[72] == "<UNUSED_0>" and tokenizer.pieces[271] == "<UNUSED_199>"
    assert tokenizer.pieces.index("[C@H]") == 287 and tokenizer.pieces[-1] == "[131Cs]"


def test_contract():
    tokenizer = get_tokenizer("megamolbart")
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (
        0,
        1,
        2,
        3,
        4,
    )
    assert tokenizer.prefix == tokenizer.suffix == () and tokenizer.num_specials == 0
    assert tokenizer.alphabet == "molecule" and tokenizer.special_ids == set(range(272))
    assert tokenizer.table.dtype == np.uint16 and tokenizer.table.shape == (256,)
    assert sorted(tokenizer.table[1:252]) == tokenizer.residue_ids.tolist() == list(range(272, 523))
    assert set(tokenizer.table[[0, *range(252, 256)]]) == {1}
    assert tokenizer.sentinel_ids.dtype == np.int64 and not len(tokenizer.sentinel_ids)


@pytest.mark.parametrize("smiles", SMILES)
def test_splits_as_published(smiles):
    tokenizer = get_tokenizer("megamolbart")
    chemistry = {piece: index for index, piece in enumerate(tokenizer.pieces) if index >= 272}
    theirs = re.findall(f"({PUBLISHED}|.)", smiles)
    if smiles.isascii():
        assert [token.decode() for token in _TOKEN.findall(smiles.encode())] == theirs
    # specials written as text are text, so they are unknown; v1 would have read `^` as the beginning
    assert tokenizer.encode(smiles).tolist() == [chemistry.get(token, 1) for token in theirs]
    if all(token in chemistry for token in theirs):
        assert tokenizer.decode([2, *tokenizer.encode(smiles), 3, 0]) == smiles


def test_codes_are_one_byte_a_token():
    tokenizer = get_tokenizer("megamolbart")
    codes = tokenizer.codes(b"C[C@H](N)[Zz]Br")
    assert len(codes) == 7 and codes[5] == 0
    assert np.array_equal(tokenizer.table[np.frombuffer(codes, np.uint8)], tokenizer.encode("C[C@H](N)[Zz]Br"))


def test_clean_takes_white_space_only():
    clean = get_tokenizer("megamolbart").clean
    assert clean(b" C-C \n") == (b"C-C", {"white_space": 3})
    assert clean(b"C.C*") == (b"C.C*", {})


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_real_molecules_come_back():
    tokenizer, known = get_tokenizer("megamolbart"), 0
    with lzma.open(SHARED, "rt") as file:
        for smiles in (line.split("\t")[0].strip() for _, line in zip(range(5_001), file)):
            ids = tokenizer.encode(smiles)
            assert [token.decode() for token in _TOKEN.findall(smiles.encode())] == re.findall(f"{PUBLISHED}|.", smiles)
            if 1 not in ids:
                known += 1
                assert tokenizer.decode(ids) == smiles
    assert known > 4_900


def test_ids_are_those_of_chemformer():
    """`pip install --no-deps syntheseus-chemformer==0.3.0`: an independent implementation, not part of [dev]."""
    package = importlib.util.find_spec("chemformer")
    if package is None or not package.submodule_search_locations:
        pytest.skip("needs syntheseus-chemformer")
    folder = Path(package.submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("molbart_tokeniser", folder / "molbart" / "tokeniser.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = get_tokenizer("megamolbart")
    vocabulary = folder / "bart_vocab.txt"
    assert vocabulary.read_text().splitlines() == ours.pieces
    theirs = module.MolEncTokeniser.from_vocab_file(vocabulary, PUBLISHED, 272)
    for smiles in SMILES[:7]:
        tokens = theirs.tokenise([smiles])["original_tokens"]
        assert theirs.convert_tokens_to_ids(tokens)[0] == [2, *ours.encode(smiles), 3]
