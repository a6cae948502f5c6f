"""Ids against the vocabularies' own tokenizers, and the rule for odd letters."""

import numpy as np
import pytest

from moltron.tokenizers import get_tokenizer
from moltron.tokenizers.residues import LEGAL, STANDARD, clean

SEQUENCES = ["MKTAYIAKQRQISFVKSHFSRQ", "ACDEFGHIKLMNPQRSTVWYXBUZO", "M", "AC.D-E"]


def test_esm2_ids_are_those_of_transformers(tmp_path):
    from transformers import EsmTokenizer

    ours = get_tokenizer("esm2")
    (tmp_path / "vocab.txt").write_text("\n".join(ours.pieces))
    theirs = EsmTokenizer(str(tmp_path / "vocab.txt"))
    # the pieces went into their file, so these ids are written out (specification models.md §3)
    fixed = {"<cls>": 0, "<pad>": 1, "<eos>": 2, "<unk>": 3, "L": 4, "A": 5, "X": 24, "O": 28, ".": 29, "-": 30}
    assert {piece: ours.pieces.index(piece) for piece in fixed} == fixed
    assert ours.pieces[31:] == ["<null_1>", "<mask>"] and ours.vocab_size == 33
    for sequence in SEQUENCES:
        assert ours.encode(sequence).tolist() == theirs(sequence)["input_ids"]
        assert ours.decode(ours.encode(sequence)) == sequence
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id, ours.unk_id) == (
        theirs.cls_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
        theirs.mask_token_id,
        theirs.unk_token_id,
    )


def test_esm1b_ids_are_those_of_fair_esm():
    from esm.data import Alphabet

    alphabet = Alphabet.from_architecture("ESM-1b")
    ours = get_tokenizer("esm2")
    assert ours.pieces == alphabet.all_toks
    convert = alphabet.get_batch_converter()
    for sequence in SEQUENCES:
        assert ours.encode(sequence).tolist() == convert([("x", sequence)])[2][0].tolist()


def test_esm1nv_vocabulary():
    tokenizer = get_tokenizer("esm1nv")
    assert tokenizer.pieces[:5] == ["<unk>", "<s>", "</s>", "<pad>", "<mask>"]
    assert "".join(tokenizer.pieces[5:]) == "LASGVERTDIPKNFQYHMCWXBZUO" and tokenizer.vocab_size == 30
    assert tokenizer.encode("LO.-").tolist() == [1, 5, 29, 0, 0, 2]


def test_prott5nv_vocabulary():
    ours, esm1nv = get_tokenizer("prott5nv"), get_tokenizer("esm1nv")
    assert ours.pieces[:30] == esm1nv.pieces and ours.pieces[30:32] == ["<cls>", "<sep>"] and ours.vocab_size == 128
    assert ours.sentinel_ids.tolist() == list(range(32, 128)) and ours.sentinel_ids.dtype == np.int64
    assert (ours.pieces[32], ours.pieces[127]) == ("<extra_id_0>", "<extra_id_95>")
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.mask_id) == (1, 2, 3, 0, None)
    assert ours.prefix == ours.suffix == () and ours.encode("LU").tolist() == [5, 28]


def test_prott5_vocabulary():
    ours = get_tokenizer("prott5")
    assert ours.pieces[:3] == ["<pad>", "</s>", "<unk>"] and ours.vocab_size == 128
    assert "".join(ours.pieces[3:28]) == "ALGVSREDTIPKFQNYMHWCXBOUZ"
    assert ours.sentinel_ids.tolist() == list(range(127, 27, -1)) and ours.pieces[127] == "<extra_id_0>"
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.unk_id, ours.mask_id) == (0, 1, 0, 2, None)
    assert ours.encode("AXBOUZ").tolist() == [3, *[ours.pieces.index("X")] * 5, 1]  # all that are not one of the 20
    assert ours.prefix == () and ours.suffix == (1,) and ours.num_specials == 1
    assert ours.decode(ours.encode("ALU")) == "ALX"


@pytest.mark.parametrize("name", ["esm2", "esm1nv", "prott5nv", "prott5", "megamolbart"])
def test_contract_of_all(name):
    ours = get_tokenizer(name)
    assert ours.name == name and ours.num_specials == len(ours.prefix) + len(ours.suffix)
    text = b"CNS"
    assert ours.clean(text) == (text, {})
    ids = [*ours.prefix, *ours.table[np.frombuffer(ours.codes(text), dtype=np.uint8)], *ours.suffix]
    assert ours.encode(text).tolist() == ours.encode("CNS").tolist() == ids
    assert ours.decode([ours.bos_id, *ids, ours.eos_id, ours.pad_id]) == "CNS"
    assert set(ours.sentinel_ids) <= ours.special_ids and not ours.special_ids & set(ours.residue_ids.tolist())


@pytest.mark.parametrize("name", ["esm2", "esm1nv"])
def test_specials_and_residues(name):
    tokenizer = get_tokenizer(name)
    assert "".join(tokenizer.pieces[i] for i in tokenizer.residue_ids) == STANDARD.decode()
    assert not tokenizer.special_ids & set(tokenizer.residue_ids.tolist())
    assert all(tokenizer.pieces[i].startswith("<") for i in tokenizer.special_ids)
    assert len(tokenizer.special_ids) == sum(piece.startswith("<") for piece in tokenizer.pieces)
    assert tokenizer.table.shape == (256,) and tokenizer.table.dtype == np.uint8
    assert tokenizer.prefix == (tokenizer.bos_id,) and tokenizer.suffix == (tokenizer.eos_id,)
    assert tokenizer.encode(b"mJ*\xff").tolist()[1:-1] == [tokenizer.unk_id] * 4
    assert tokenizer.encode("é").tolist()[1:-1] == [tokenizer.unk_id]
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.mask_id, 5, tokenizer.eos_id, tokenizer.pad_id]).startswith(
        "<m"
    )


def test_unknown_name():
    with pytest.raises(ValueError, match="esm2, esm1nv, prott5nv, prott5 or megamolbart"):
        get_tokenizer("esm3")


@pytest.mark.parametrize(
    ("dirty", "expected", "counts"),
    [
        (b"MKT", b"MKT", {}),
        (LEGAL, LEGAL, {}),
        (b"mKt", b"MKT", {"lower_case": 2}),
        (b" M\tK\r\nT\x0b", b"MKT", {"white_space": 5}),
        (b"MK-T..", b"MKT", {"gap": 3}),
        (b"MKT**", b"MKT", {"final_stop": 2}),
        (b"MKT* -", b"MKT", {"final_stop": 1, "white_space": 1, "gap": 1}),
        (b"M*KT*", b"MXKT", {"inner_stop": 1, "final_stop": 1}),
        (b"MJj", b"MXX", {"J": 2, "lower_case": 1}),
        (b"M1?>\x00", b"MXXXX", {"unknown": 4}),
        ("Mé\u00a0K".encode(), b"MXK", {"unknown": 1, "white_space": 1}),
        (b"M\xffK", b"MXK", {"unknown": 1}),
        (b"*", b"", {"final_stop": 1}),
        (b"", b"", {}),
    ],
)
def test_clean(dirty, expected, counts):
    assert clean(dirty) == (expected, counts)
    assert clean(expected) == (expected, {})  # cleaning twice changes nothing


def test_clean_takes_every_byte():
    rng = np.random.default_rng(0)
    for _ in range(200):
        cleaned, _ = clean(rng.integers(0, 256, 50, dtype=np.uint8).tobytes())
        assert set(cleaned) <= set(LEGAL)
