"""MegaMolBART's vocabulary and expression (specification models.md §3)."""

import hashlib
import re

import numpy as np
import pytest

from moltron.tokenizers import NAMES, get_tokenizer

TOKENIZER = get_tokenizer("megamolbart")
VOCABULARY = "6ca0a9f02399c637b7210c1dae696496cce14d8b0b53421244e44094c5e8fe31"
# Chemformer's expression, as published with its bart_vocab.txt
PUBLISHED = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9]|.)"
MOLECULES = [
    "CC(=O)Oc1ccccc1C(=O)O",
    "C[C@H](N)C(=O)[O-].[Na+]",
    "F/C=C\\Cl",
    "c1ccc2[nH]ccc2c1",
    "BrCCBr",
    "C%10CCCCC%10",
]


def test_all_523_pieces_stand_where_they_were_published():
    """As in github.com/MolecularAI/Chemformer, bart_vocab.txt at 9a65a90e: 5,496 characters with its last line end."""
    text = "\n".join(TOKENIZER.pieces)
    assert TOKENIZER.vocab_size == len(set(TOKENIZER.pieces)) == 523
    assert len(text) == 5495
    assert hashlib.sha256(text.encode()).hexdigest() == VOCABULARY
    fixed = {"<PAD>": 0, "?": 1, "^": 2, "&": 3, "<MASK>": 4, "<SEP>": 5, "C": 272, "c": 273, "1": 274, "(": 275}
    assert {piece: TOKENIZER.pieces.index(piece) for piece in fixed} == fixed
    assert TOKENIZER.pieces[6] == "LogD_change_(-0.1, 0.1]" and TOKENIZER.pieces[65] == "LogD_change_(-inf, -5.7]"
    assert TOKENIZER.pieces[66] == "Solubility_low->high" and TOKENIZER.pieces[271] == "<UNUSED_199>"


@pytest.mark.parametrize("smiles", MOLECULES)
def test_tokens_are_the_published_expression_s(smiles):
    ids = {piece: i for i, piece in enumerate(TOKENIZER.pieces)}
    assert TOKENIZER.encode(smiles).tolist() == [ids[token] for token in re.findall(PUBLISHED, smiles)]
    assert TOKENIZER.decode([2, *TOKENIZER.encode(smiles), 3, 0]) == smiles


def test_unknown_tokens_are_the_question_mark():
    assert TOKENIZER.encode("C[Xx]é\nC").tolist() == [272, 1, 1, 1, 272]
    assert TOKENIZER.decode(TOKENIZER.encode("C[Xx]C")) == "C?C"


def test_codes_fit_into_bytes_and_the_table_gives_ids():
    codes = TOKENIZER.codes("".join(TOKENIZER.pieces[272:]).encode())
    assert TOKENIZER.table[np.frombuffer(codes, dtype=np.uint8)].tolist() == list(range(272, 523))
    assert TOKENIZER.table[TOKENIZER.unk_code] == 1


@pytest.mark.parametrize("name", NAMES)
def test_all_tokenizers_have_what_others_read(name):
    tokenizer = get_tokenizer(name)
    written = b"CCO" if tokenizer.alphabet == "molecule" else b"MKT"
    ids = tokenizer.encode(written)
    assert ids.dtype == np.int64 and tokenizer.num_specials == len(tokenizer.prefix) + len(tokenizer.suffix)
    inside = tokenizer.table[np.frombuffer(tokenizer.codes(written), dtype=np.uint8)].tolist()
    assert ids.tolist() == [*tokenizer.prefix, *inside, *tokenizer.suffix]
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == written.decode()
    assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, *tokenizer.sentinel_ids} <= tokenizer.special_ids
    assert tokenizer.clean(b" " + written + b"\n")[0] == written
