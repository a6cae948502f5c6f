"""Every way in which a file can be odd: read, rejected with its line, or an error that says where."""

import bz2
import gzip
import io
import lzma
import sys
from pathlib import Path

import pytest
import zstandard

from moltron.data.readers import Record, Reject, Source, check_alphabet, expand_inputs, read_records
from moltron.infer.molecules import COLUMNS
from moltron.tokenizers import get_tokenizer

PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}


def read(path: Path, content: bytes | str, **columns) -> list:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_records(path, **columns))


def short(items: list) -> list:
    return [(i.id, i.sequence if isinstance(i, Record) else i.reason, i.line) for i in items]


# ---- FASTA


def test_fasta_ids_and_lines(tmp_path):
    items = read(tmp_path / "a.fasta", ">a first one\nMK\nTA\n\n>b\nMK TA\n\n\n>c")
    assert short(items) == [("a", b"MKTA", 1), ("b", b"MK TA", 5), ("c", "no sequence", 9)]
    assert {item.source for item in items} == {str(tmp_path / "a.fasta")}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_mark(tmp_path, end, mark):
    text = end.join([">a x", "MKT", "AAA", ">b", "CC", ""]).encode()
    assert short(read(tmp_path / "a.fasta", mark + text)) == [("a", b"MKTAAA", 1), ("b", b"CC", 4)]


def test_bad_fasta_records_do_not_stop_the_reading(tmp_path):
    text = b"\n; made by hand\n>\nMKT\n>a\n>b\n  \n>c caf\xe9\nMK\xe9T\n>d\xe9\nMK\n>e>f\nMK\n"
    assert short(read(tmp_path / "a.fa", text)) == [
        ("", "text before the first header", 2),
        ("", "no id", 3),
        ("a", "no sequence", 5),
        ("b", "no sequence", 6),
        ("c", b"MK\xe9T", 8),
        ("d?", "the id has control characters or is not UTF-8", 10),
        ("e>f", b"MK", 12),
    ]


@pytest.mark.parametrize("text", ["", "\n\n", "MKTAYIA\nMKT\n"])
def test_not_fasta_is_an_error(tmp_path, text):
    with pytest.raises(ValueError, match=r"a\.fasta is not FASTA"):
        read(tmp_path / "a.fasta", text)


# ---- compression

FASTA = b"".join(b">s%d\n%s\n" % (i, bytes([65 + i * j % 23 for j in range(50)])) for i in range(3000))


@pytest.mark.parametrize("kind", PACK)
def test_compressed_files_are_read_whole_or_not_at_all(tmp_path, kind):
    packed = PACK[kind](FASTA)
    path = tmp_path / f"a.fasta.{kind}"
    assert len(read(path, packed)) == 3000
    assert len(read(path, packed + packed)) == 6000
    for cut in (len(packed) - 1, len(packed) - 9, len(packed) // 2, 20):
        with pytest.raises(ValueError, match=rf"a\.fasta\.{kind} is truncated.* after line \d+, \d+ records"):
            read(path, packed[:cut])
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0x55
    with pytest.raises(ValueError, match=rf"a\.fasta\.{kind} is truncated or damaged"):
        read(path, bytes(damaged) if kind != "zst" else packed + b"garbage")


@pytest.mark.parametrize("kind", PACK)
def test_a_damaged_second_frame_is_no_end_of_file(tmp_path, kind):
    packed = PACK[kind](FASTA)
    for at in (30, len(packed) // 2):  # the libraries' own readers of bzip2 and xz stop in silence at some of these
        second = bytearray(packed)
        second[at : at + 20] = bytes(20)
        with pytest.raises(ValueError, match="is truncated or damaged"):
            read(tmp_path / "a.fasta", packed + bytes(second))


def test_compression_is_known_by_content_not_name(tmp_path):
    assert len(read(tmp_path / "a.fasta", gzip.compress(FASTA))) == 3000
    assert len(read(tmp_path / "b.fasta.gz", FASTA)) == 3000


def test_source_hashes_the_file_it_read(tmp_path):
    import hashlib

    packed = gzip.compress(FASTA)
    (tmp_path / "a.fasta.gz").write_bytes(packed)
    with Source(str(tmp_path / "a.fasta.gz")) as source:
        assert sum(1 for _ in source.records()) == 3000
        described = source.describe()
        assert described["sha256"] == hashlib.sha256(packed).hexdigest() and described["bytes"] == len(packed)


# ---- tables


def test_csv_with_quotes_and_line_numbers(tmp_path):
    text = 'id,note,sequence\na,"x, ""y""",MKT\nb,"two\nlines","M,K"\n\nc,x\nd,x,\n,x,MK\ne,x,AA\n'
    assert short(read(tmp_path / "a.csv", text)) == [
        ("a", b"MKT", 2),
        ("b", b"M,K", 3),
        ("c", "fewer than 3 columns", 6),
        ("d", "no sequence", 7),
        ("", "no id", 8),
        ("e", b"AA", 9),
    ]


def test_a_row_with_too_many_cells_is_a_reject(tmp_path):
    """Which of them is the sequence? A name with a comma and without quotes moves all that follow."""
    text = "id,name,sequence\na,alpha, beta,MKT\nb,gamma,MKT\nc,delta,MKT,,\n"
    assert short(read(tmp_path / "a.csv", text)) == [
        ("a", "more cells than columns: quote what has the separator in it", 2),
        ("b", b"MKT", 3),
        ("c", b"MKT", 4),
    ]


def test_semicolons_of_excel(tmp_path):
    assert short(read(tmp_path / "a.csv", "id;sequence\na;MKT\nb,c;AA\n")) == [("a", b"MKT", 2), ("b,c", b"AA", 3)]


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        ("name,seq,x", {"sequence_column": "seq"}, ("1", b"2")),
        ("accession,organism,protein_sequence", {}, ("1", b"3")),
        ("canonical_smiles,name,smiles_id", {}, ("3", b"1")),
        ("seq,name", {"id_column": "name"}, ("2", b"1")),
        ("x,sequence,id", {}, ("3", b"2")),
        ("record_id,record_name,sequence", {}, ("1", b"3")),  # v1's UniRef50 shards
        ("a,b,c", {"id_column": "c", "sequence_column": "a"}, ("3", b"1")),
        ("smiles,zinc_id,x", {}, ("2", b"1")),
        ("sequence,target,split", {}, ("a:2", b"1")),
        ("sequence\ttarget\tid", {}, ("3", b"1")),
    ],
)
def test_columns(tmp_path, header, columns, expected):
    separator = "\t" if "\t" in header else ","
    row = separator.join("123"[: len(header.split(separator))])
    item = read(tmp_path / "a.csv", f"\ufeff{header}\r\n{row}\r\n", **columns)[0]
    assert (item.id, item.sequence) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is empty"),
        ("only\nx\n", r"none of its columns \(only\) is called sequence or smiles: set sequence_column="),
        ("accession,organism,seq\nA1,MALE,MKTAYIAK\n", r"none of its columns \(accession, organism, seq\) is called"),
        ("smiles_in,smiles_out\nC,O\n", r"more than one of its columns \(smiles_in, smiles_out\) is called"),
        ("a,MKTAYIAKQRQIS\nb,MKT\n", "line 1: a record .* where the names of the columns"),
        ("P1,MKTAYIAK\nP2,MKT\n", r"line 1: a record \(P1, MKTAYIAK\) where the names"),
        ("p1,mktayiakqrqis\np2,mkt\n", "line 1: a record"),
        ("m1,CC(=O)Nc1ccccc1\nm2,CCO\n", "line 1: a record"),
        ("m1,c1ccccc1\nm2,CCO\n", "line 1: a record"),
        ('id,sequence\na,MKT\nb,"MKT\nc,MKT\n', "line 3: not a table row"),
    ],
)
def test_bad_tables_are_errors(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        read(tmp_path / "a.csv", text)


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no column 'seq'; it has id, sequence"):
        read(tmp_path / "a.csv", "id,sequence\na,M\n", sequence_column="seq")


@pytest.mark.parametrize("header", ["name,seq", "Entry,Protein", "ID,SEQ", "ACCESSION,PEPTIDE", "x,residues"])
def test_of_two_columns_the_second_has_the_sequences_and_the_log_says_so(tmp_path, header, caplog):
    caplog.set_level("INFO", "moltron")
    assert short(read(tmp_path / "a.csv", f"{header}\np1,MKT\n")) == [("p1", b"MKT", 2)]
    first, second = header.split(",")
    assert f"a.csv: ids are read from column {first}, sequences from {second}" in caplog.text


@pytest.mark.parametrize(
    ("header", "row", "name"),
    [
        ("mw,smiles", "46.1,CCO", "a:2"),
        ("smiles,label", "CCO,1", "a:2"),
        ("class,split,product,reactants_smiles", "1,train,CC,CCO", "a:2"),
        ("batch_id,mol_id,smiles", "b,m1,CCO", "a:2"),  # which of them?
        ("SMILES,Compound Name", "CCO,ethanol", "ethanol"),
        ("zinc_id,tranche_name,smiles", "z1,t,CCO", "z1"),
        ("target,sequence,split", "46.1,CCO,train", "a:2"),
    ],
)
def test_ids_are_of_a_column_that_is_called_so_or_made(tmp_path, header, row, name, caplog):
    caplog.set_level("INFO", "moltron")
    assert short(read(tmp_path / "a.csv", f"{header}\n{row}\n")) == [(name, b"CCO", 2)]
    assert "a.csv: ids are read from " in caplog.text


@pytest.mark.parametrize("first", ["m1,CC(=O)[O-].[Na+]", "m1,C[Si](C)(C)C", "m1,CCO"])
def test_a_molecule_is_no_header(tmp_path, first):
    with pytest.raises(ValueError, match=r"a record .* where the names of the columns are expected"):
        read(tmp_path / "a.csv", f"{first}\nm2,CCO\n")


def test_quotes_that_join_lines_are_told(tmp_path, caplog):
    text = 'smiles\tid\tnote\nCCO\te1\t"odd start\nCCC\te2\tx\nCCN\te3\tend"\nCCCC\te4\tz\n'
    assert len(read(tmp_path / "a.tsv", text)) == 2
    assert "a.tsv: quotes join lines 2 to 4: is a mark missing?" in caplog.text


def test_one_odd_record_of_few_is_not_another_alphabet():
    records = [Record(str(i), s, "a", i) for i, s in enumerate([b"CCO", b"OCC", b"not_a_smiles_at_all", b"CCN"])]
    assert list(check_alphabet(iter(records), get_tokenizer("megamolbart"))) == records
    with pytest.raises(ValueError, match="letters stand for nothing in a molecule"):
        list(check_alphabet(iter([records[0], *[records[2]] * 2]), get_tokenizer("megamolbart")))


@pytest.mark.parametrize(
    ("name", "content", "tokenizer", "match"),
    [
        ("a.fasta", ">a\nMKTAYIAK\n", "megamolbart", "a.fasta holds proteins, molecules are wanted"),
        ("m.smi", "CCO\n", "esm2", "m.smi holds molecules, proteins are wanted"),
        ("m.csv", "name,canonical_smiles\na,CCO\n", "esm2", "m.csv holds molecules, proteins are wanted"),
        ("m.csv", "id,sequence\na,CC(=O)Nc1ccc(O)cc1\n", "esm2", "line 2 on: 39% of the letters .* in a protein"),
        ("a.csv", "id,sequence\na,MKTAYIAKQR\n", "megamolbart", "line 2 on: 90% of the letters .* in a molecule"),
    ],
)
def test_another_alphabet_is_an_error(tmp_path, name, content, tokenizer, match):
    with pytest.raises(ValueError, match=match):
        read(tmp_path / name, content, tokenizer=get_tokenizer(tokenizer))


def test_a_table_that_does_not_say_serves_both_alphabets_and_some_odd_letters_do_no_harm(tmp_path):
    for tokenizer, sequence in (("esm2", "MKT?-aX*JK1"), ("megamolbart", "CC(=O)[Uuo]N")):
        items = read(tmp_path / "a.csv", f"id,sequence\na,{sequence}\n", tokenizer=get_tokenizer(tokenizer))
        assert short(items) == [("a", sequence.encode(), 2)]


def test_smiles_files(tmp_path):
    items = read(tmp_path / "m.smi", "canonical_smiles name\nCCO ethanol\n\nC1CC1\nN  two words \n")
    assert short(items) == [("ethanol", b"CCO", 2), ("m:4", b"C1CC1", 4), ("two words", b"N", 5)]
    kinds = {"m.smi": "molecule", "a.csv": "molecule", "b.csv": None}
    (tmp_path / "a.csv").write_text("id,SMILES\na,C\n")
    (tmp_path / "b.csv").write_text("id,sequence\na,C\n")
    for name, kind in kinds.items():
        with Source(str(tmp_path / name)) as source:
            assert source.kind == kind


# ---- which files


@pytest.mark.parametrize("pattern", ["x[008..011]", "x(008..011)", "x<008..011>", "x_OP_008..011_CL_"])
@pytest.mark.parametrize("suffix", [".csv", ".fasta.gz"])
@pytest.mark.parametrize("written", [True, False])
def test_ranges(tmp_path, pattern, suffix, written):
    names = [f"x{number:03d}{suffix}" for number in range(8, 12)]
    for name in names:
        (tmp_path / name).touch()
    assert expand_inputs(tmp_path / (pattern + (suffix if written else ""))) == [str(tmp_path / name) for name in names]
    (tmp_path / names[2]).unlink()
    with pytest.raises(ValueError, match=r"1 of the 4 files .*x\[?.* missing: .*x010"):
        expand_inputs(tmp_path / pattern)


def test_single_files_folders_and_literal_brackets(tmp_path):
    for name in ("b.fasta", "a.csv.zst", "README.md", "x[1..2].fasta", "out.npz.rejects.tsv"):
        (tmp_path / name).touch()
    assert expand_inputs(tmp_path / "b") == [str(tmp_path / "b.fasta")]
    assert expand_inputs(tmp_path / "x[1..2].fasta") == [str(tmp_path / "x[1..2].fasta")]
    assert expand_inputs(tmp_path) == [str(tmp_path / name) for name in ("a.csv.zst", "b.fasta", "x[1..2].fasta")]
    assert expand_inputs("-") == ["-"]
    (tmp_path / "b.csv").touch()
    with pytest.raises(ValueError, match=r"b\.csv or .*b\.fasta"):
        expand_inputs(tmp_path / "b")
    with pytest.raises(ValueError, match="runs backwards"):
        expand_inputs(tmp_path / "x[9..1]")
    with pytest.raises(ValueError, match=r"no such file: .*nothing"):
        expand_inputs(tmp_path / "nothing")
    (tmp_path / "store").mkdir()
    for name in ("train.arrow", "rejects.tsv", "lengths.png"):
        (tmp_path / "store" / name).touch()
    with pytest.raises(ValueError, match=r"store is a prepared store: give what it was made of"):
        expand_inputs(tmp_path / "store")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="folder without any"):
        expand_inputs(tmp_path / "empty")


def test_generated_molecules_are_read_by_name_not_with_a_folder(tmp_path, caplog):
    caplog.set_level("INFO", "moltron")
    (tmp_path / "in.csv").write_text("id,smiles\na,CCO\n")
    (tmp_path / "new.csv").write_text(f"{','.join(COLUMNS)}\na,CCO,0,CCN,1,-1.5,0.4,0.5,1\n")
    assert expand_inputs(tmp_path) == [str(tmp_path / "in.csv")]
    assert "a command of moltron wrote them" in caplog.text and "new.csv" in caplog.text
    assert [(item.id, item.sequence) for item in read_records(tmp_path / "new.csv")] == [("a", b"CCN")]


@pytest.mark.parametrize("content", [b">a\nMK\n", gzip.compress(b"id,sequence\na,MK\n")], ids=["fasta", "csv.gz"])
def test_standard_input(monkeypatch, content):
    class Stdin:
        buffer = io.BytesIO(content)

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert [(item.id, item.sequence) for item in read_records("-")] == [("a", b"MK")]
    assert not Stdin.buffer.closed


def test_unknown_format_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="neither FASTA"):
        read(tmp_path / "a.bin", "hello\n")
    with pytest.raises(ValueError, match=r"curve\.png is no text in UTF-8: give FASTA"):
        read(tmp_path / "curve.png", b"\x89PNG\r\n\x1a\n\0\0,\t")
    with pytest.raises(ValueError, match=r"a\.csv is no text in UTF-8"):
        read(tmp_path / "a.csv", "id,sequence\na,MKT\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"val\.arrow is a split of a prepared store, which only evaluate reads"):
        read(tmp_path / "val.arrow", b"ARROW1\0\0")


def test_reject_has_what_a_user_needs(tmp_path):
    assert read(tmp_path / "a.fasta", ">a\n>b\nM\n")[0] == Reject(str(tmp_path / "a.fasta"), 1, "a", "no sequence")
