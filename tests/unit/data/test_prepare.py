"""moltron prepare, end to end on small inputs: what is kept, where it goes, and what is said of the rest."""

import csv
import gc
import gzip
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moltron.common.manifest import read_json, sha256_file
from moltron.config.schema import PrepareConfig
from moltron.data.prepare import keys as keys_module
from moltron.data.prepare import prepare, spool
from moltron.data.prepare.keys import Lookup, draw, first_of_equals, keys_of
from moltron.data.store import Store

SHARED = Path(__file__).parents[4] / "shared" / "data" / "protein" / "uniref202104_esm2_sample"


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Many record batches even for small inputs."""
    monkeypatch.setattr(spool, "_BATCH_ROWS", 7)
    monkeypatch.setattr(spool, "_BATCH_LETTERS", 500)
    monkeypatch.setattr("moltron.data.prepare.clusters._CHUNK", 5)


def fasta(path: Path, records) -> str:
    path.write_text("".join(f">{name} words\n{sequence}\n" for name, sequence in records))
    return str(path)


def made_up(count: int, prefix: str = "r") -> list[tuple[str, str]]:
    rng = np.random.default_rng(len(prefix))
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    return [(f"{prefix}{i}", prefix.upper() + "".join(rng.choice(letters, rng.integers(5, 60)))) for i in range(count)]


def content(folder, split) -> dict[str, str]:
    path = Path(folder) / f"{split}.arrow"
    if not path.exists():
        return {}
    store = Store.open(path)
    return dict(zip(store.ids(range(len(store))), store.texts(range(len(store)))))


def rejects(folder) -> list[tuple[str, str, str]]:
    with open(Path(folder) / "rejects.tsv", newline="") as file:
        return [(row["line"], row["id"], row["reason"]) for row in csv.DictReader(file, delimiter="\t")]


def run(tmp_path, records, **options):
    output = tmp_path / "out"
    manifest = prepare(PrepareConfig(input=fasta(tmp_path / "in.fasta", records), output=str(output), **options))
    return output, manifest


def test_everything_is_kept_in_order_and_described(tmp_path):
    records = made_up(100)
    output, manifest = run(tmp_path, records)
    assert list(content(output, "train").items()) == records
    assert manifest == read_json(output / "manifest.json")
    train = manifest["splits"]["train"]
    lengths = sorted(len(sequence) for _, sequence in records)
    assert train["records"] == 100 and train["residues"] == sum(lengths) == sum(train["alphabet"].values())
    assert (train["lengths"]["min"], train["lengths"]["max"]) == (lengths[0], lengths[-1])
    assert train["lengths"]["p50"] == lengths[49] and train["lengths"]["p95"] == lengths[94]
    assert sum(train["lengths"]["histogram"]["counts"]) == 100
    assert train["files"]["train.arrow"]["sha256"] == sha256_file(output / "train.arrow")
    assert manifest["sources"] == [
        {
            "path": str(tmp_path / "in.fasta"),
            "bytes": (tmp_path / "in.fasta").stat().st_size,
            "sha256": sha256_file(tmp_path / "in.fasta"),
            "records": 100,
        }
    ]
    assert manifest["records"] == {"read": 100, "kept": 100, "unused": 0, "rejected": 0} and rejects(output) == []
    assert (output / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in output.iterdir() if p.suffix != ".npy") == [
        "lengths.png",
        "manifest.json",
        "rejects.tsv",
        "train.arrow",
        "train.stamp.json",
    ]


def test_odd_records_are_cleaned_counted_or_rejected_with_their_line(tmp_path):
    records = [("a", "mkta*"), ("a", "WWWW"), ("b", "MKTA"), ("c", "--"), ("d", "M"), ("e", "MKTJ1"), ("f", "A" * 40)]
    output, manifest = run(tmp_path, records, min_length=2, max_length=39)
    assert content(output, "train") == {"a": "MKTA", "e": "MKTXX"}
    assert sorted(rejects(output)) == [
        ("13", "f", "longer than max_length=39"),
        ("3", "a", "the id was used by an earlier record"),
        ("5", "b", "sequence equal to an earlier one"),
        ("7", "c", "no residues"),
        ("9", "d", "shorter than min_length=2"),
    ]
    assert manifest["cleaning"] == {"records": 3, "lower_case": 4, "final_stop": 1, "gap": 2, "J": 1, "unknown": 1}
    assert manifest["records"] == {"read": 7, "kept": 2, "unused": 0, "rejected": 5}
    assert manifest["rejects"]["no residues"] == 1
    options = {"illegal": "reject", "duplicates": "keep", "overwrite": True}
    output, manifest = run(tmp_path, records, **options)
    assert list(content(output, "train")) == ["a", "b", "d", "f"]
    assert ("11", "e", "letters that are no residues") in rejects(output)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_nothing_stays_open(tmp_path):
    gc.disable()  # which would close what was forgotten
    try:
        run(tmp_path, made_up(5))
        opened = filter(os.path.islink, Path("/proc/self/fd").iterdir())
        assert not [link for link in map(os.readlink, opened) if str(tmp_path) in link]
    finally:
        gc.enable()


# ---- splits


def test_split_by_count_and_fraction_depends_on_seed_and_ids_only(tmp_path):
    records = made_up(200)
    output, manifest = run(tmp_path, records, val_size=10, test_size=0.25)
    splits = {name: content(output, name) for name in ("train", "val", "test")}
    assert [len(s) for s in splits.values()] == [140, 10, 50]
    assert {k: v for s in splits.values() for k, v in s.items()} == dict(records)
    again, _ = run(tmp_path, records[::-1], val_size=10, test_size=0.25, overwrite=True)
    assert content(again, "val") == splits["val"] and content(again, "test") == splits["test"]
    other, _ = run(tmp_path, records, val_size=10, test_size=0.25, seed=1, overwrite=True)
    assert content(other, "val") != splits["val"]
    assert manifest["splits"]["val"]["records"] == 10


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_equal_sequences_never_on_both_sides(tmp_path, duplicates):
    sequences = [s for _, s in made_up(40)]
    records = [(f"id{i}", sequences[i % 40]) for i in range(200)]
    output, manifest = run(tmp_path, records, val_size=0.3, test_size=0.2, duplicates=duplicates)
    splits = [content(output, name) for name in ("train", "val", "test")]
    assert sum(map(len, splits)) == (200 if duplicates == "keep" else 40) == manifest["records"]["kept"]
    assert [len(set(s.values())) for s in splits] == [20, 12, 8]
    assert sum(len(set(s.values())) for s in splits) == len({v for s in splits for v in s.values()})


def test_split_by_file_takes_leaks_out_of_train(tmp_path):
    records = made_up(20)
    val = [*made_up(5, "v"), ("v-leak", records[3][1]), ("both", records[5][1])]
    test = [*made_up(5, "te"), ("r0", "WWWW"), ("both", records[5][1])]
    output, manifest = run(
        tmp_path, records, val_input=fasta(tmp_path / "v.fa", val), test_input=fasta(tmp_path / "t.fa", test)
    )
    assert content(output, "test") == dict(test)
    assert content(output, "val") == dict(val[:-1])
    assert content(output, "train") == {k: v for k, v in records if k not in ("r3", "r5")}
    leak = "sequence equal to one in val or test"
    assert rejects(output) == [("7", "r3", leak), ("11", "r5", leak), ("13", "both", leak)]
    assert manifest["rejects"] == {leak: 3}


def test_a_training_split_that_val_takes_whole_is_an_error(tmp_path):
    records = made_up(4)
    with pytest.raises(ValueError, match="nothing is left to train on"):
        run(tmp_path, records, val_input=fasta(tmp_path / "v.fa", records))


# ---- clusters


def clustered(count=60, size=4):
    return [(name, sequence, f"c{int(name[1:]) // size}") for name, sequence in made_up(count)]


def check_clusters(output, of: dict[str, str]):
    """The store's clusters are those of `of`, each row once."""
    store = Store.open(output / "train.arrow")
    names = store.ids(range(len(store)))
    clusters = store.clusters
    assert sorted(clusters.order) == list(range(len(store)))
    assert clusters.start.tolist() == [0, *np.cumsum(clusters.count)[:-1]]
    for start, count in zip(clusters.start, clusters.count):
        members = [names[row] for row in clusters.order[start : start + count]]
        assert len({of[m] for m in members}) == 1
        assert set(members) == {name for name in names if of[name] == of[members[0]]}
    return clusters


@pytest.mark.parametrize("shape", ["mmseqs", "tsv", "csv.gz"])
def test_clusters_stay_together(tmp_path, shape):
    records = clustered()
    of = {name: cluster for name, _, cluster in records}
    rows = [(name, f"x{i}", cluster) for i, (name, _, cluster) in enumerate(records[::-1])]
    path = tmp_path / f"clusters.{shape}"
    if shape == "mmseqs":
        path.write_text("".join(f"{cluster}\t{name}\n" for name, _, cluster in rows))
        options = {}
    else:
        rows = [("id", "other", "family"), ("elsewhere", "x", "c1"), *rows]
        text = "\n".join(("\t" if shape == "tsv" else ",").join(row) for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if shape.endswith("gz") else text.encode())
        options = {"cluster_column": "family"}
    records = [(name, sequence) for name, sequence, _ in records]
    output, manifest = run(tmp_path, records, clusters=str(path), val_size=2, test_size=0.2, **options)
    assert len(check_clusters(output, of)) == 10 == manifest["splits"]["train"]["clusters"]
    assert {of[name] for name in content(output, "val")}.isdisjoint(of[name] for name in content(output, "train"))
    assert [len(content(output, split)) for split in ("train", "val", "test")] == [40, 8, 12]
    absent = 0 if shape == "mmseqs" else 1
    assert manifest["clusters"] == {"records_in_no_cluster": 0, "members_not_in_input": absent}


def test_split_column_rules_and_records_in_no_cluster_are_their_own(tmp_path):
    records = clustered(12)
    split = ["train", "val", "test"]
    table = "id\tcl\tsplit\n" + "".join(f"{n}\t{c}\t{split[int(c[1])]}\n" for n, _, c in records)
    (tmp_path / "t.tsv").write_text(table + "r0\tother\tval\n")
    given = [(n, s) for n, s, _ in records] + made_up(2, "alone")
    options = {"clusters": str(tmp_path / "t.tsv"), "cluster_column": "cl"}
    output, manifest = run(tmp_path, given, **options)
    assert list(content(output, "train")) == ["r0", "r1", "r2", "r3", "alone0", "alone1"]
    assert list(content(output, "val")) == ["r4", "r5", "r6", "r7"]
    of = {name: name if name.startswith("alone") else "c" for name in content(output, "train")}
    assert check_clusters(output, of).count.tolist() == [4, 1, 1]
    assert manifest["clusters"] == {"records_in_no_cluster": 2, "members_not_in_input": 0}
    assert rejects(output) == [("14", "r0", "listed in a second cluster, stays in the first")]
    with pytest.raises(ValueError, match="leave val_size and test_size out"):
        run(tmp_path, given, val_size=1, overwrite=True, **options)


def test_split_column_keeps_test_whole(tmp_path):
    records = [("a", "MKT"), ("b", "MKT"), ("c", "MKA"), ("d", "MKT"), ("e", "MKT"), ("f", "MKC")]
    splits = ["train", "test", "val", "val", "test", "train"]
    (tmp_path / "t.tsv").write_text(
        "id\tcl\tsplit\n" + "".join(f"{r[0]}\t{r[0]}\t{s}\n" for r, s in zip(records, splits))
    )
    output, _ = run(tmp_path, records, clusters=str(tmp_path / "t.tsv"), cluster_column="cl")
    assert [list(content(output, split)) for split in ("train", "val", "test")] == [["f"], ["c"], ["b"]]
    leak, equal = "sequence equal to one in val or test", "sequence equal to an earlier one"
    assert rejects(output) == [("1", "a", leak), ("7", "d", leak), ("9", "e", equal)]


@pytest.mark.parametrize(
    ("text", "column", "match"),
    [
        ("id\ta\tb\nr0\t1\t2\n", None, "set cluster_column; it has the columns id, a, b"),
        ("id\ta\nr0\t1\n", "c", "no column 'c'"),
        ("r0\t1\t2\n", None, "neither MMseqs2's two columns"),
        ("c0\tr0\n", "a", "needs a header line"),
        ("c0\tr0\nc0\n", None, "line 2: fewer than 2 columns"),
        ("c0\tzzz\n", None, "none of the input's ids"),
        ("", None, "neither MMseqs2's"),
        ("id\ta\tsplit\nr0\t1\tdev\n", "a", "line 2: split 'dev' is not train, val or test"),
    ],
)
def test_bad_cluster_tables_are_errors(tmp_path, text, column, match):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(ValueError, match=match):
        run(tmp_path, made_up(3), clusters=str(tmp_path / "t.tsv"), cluster_column=column)
    assert not (tmp_path / "out").exists()


# ---- UniRef50 -> UniRef90


def mapped(tmp_path, heads, members, lines, **options):
    (tmp_path / "map.tsv").write_text("\n".join(lines) + "\n")
    files = {"members": fasta(tmp_path / "m.fasta", members), "mapping": str(tmp_path / "map.tsv")}
    return run(tmp_path, heads, **files, **options)


@pytest.mark.parametrize("style", ["literal", "bare mapping", "bare files"])
def test_mapping(tmp_path, style):
    full, bare = ("UniRef50_", "UniRef90_"), ("", "")
    in_files, in_mapping = {"literal": (full, full), "bare mapping": (full, bare), "bare files": (bare, full)}[style]
    members = [(f"{in_files[1]}m{i}", s) for i, (_, s) in enumerate(made_up(30, "q"))]
    heads = [(f"{in_files[0]}h{i}", members[3 * i][1]) for i in range(10)]  # UniRef50's sequence is a member's
    own = [[f"{in_mapping[1]}m{i}" for i in (3 * h, 3 * h + 1, 3 * h + 2)] for h in range(10)]
    lines = ["name\tids", *(f"{in_mapping[0]}h{h}\t{','.join(own[h])}" for h in reversed(range(10)))]
    output, manifest = mapped(tmp_path, heads, members, lines, val_size=2, test_size=0.1)
    train, val, test = (content(output, split) for split in ("train", "val", "test"))
    assert len(train) == 21 and len(val) == 2 and len(test) == 1
    drawn = {int(name.removeprefix(in_files[0])[1:]) for name in (*val, *test)}
    assert all(name in dict(heads) and dict(heads)[name] == text for name, text in {**val, **test}.items())
    assert train == {name: text for i, (name, text) in enumerate(members) if i // 3 not in drawn}
    of = {name: str(i // 3) for i, (name, _) in enumerate(members)}
    assert check_clusters(output, of).count.tolist() == [3] * 7
    assert rejects(output) == [] and manifest["clusters"] == {"clusters_not_in_input": 0}
    assert manifest["records"] == {"read": 40, "kept": 24, "unused": 16, "rejected": 0}


def test_what_the_mapping_lacks_is_reported(tmp_path):
    texts = dict(made_up(9, "q"))
    heads = [("h0", "HHHH"), ("h1", "GGGG"), ("h2", "FFFF"), ("h3", "EEEE")]
    lines = ["cluster\tmembers", "h0\tq0,q1,q0,gone", "h1\tq1,q2", "h2\tgone2", "h9\tq5", "h9\tq6"]
    output, manifest = mapped(tmp_path, heads, texts.items(), lines)
    assert list(content(output, "train")) == ["q0", "q1", "q2"]
    assert Store.open(output / "train.arrow").clusters.count.tolist() == [2, 1]
    second, gone = "member is listed a second time", "member is not in the members file"
    assert rejects(output) == [
        ("2", "q0", second),
        ("2", "gone", gone),
        ("3", "q1", second),
        ("4", "gone2", gone),
        ("5", "h2", "none of its members is in the members file"),
        ("7", "h3", "not in the mapping"),
    ]
    assert manifest["clusters"] == {"clusters_not_in_input": 2}


def test_mapping_without_a_header_line_loses_nothing(tmp_path):
    members = made_up(4, "q")
    output, _ = mapped(tmp_path, [("h0", "HHHH"), ("h1", "GGGG")], members, ["h0\tq0,q1", "h1\tq2,q3"])
    assert content(output, "train") == dict(members)


def test_equal_members_are_dropped_within_a_cluster_only(tmp_path):
    members = [("a", "MKT"), ("b", "MKT"), ("c", "MKT"), ("d", "MKA")]
    output, _ = mapped(tmp_path, [("h0", "HHHH"), ("h1", "HHHH")], members, ["x\ty", "h0\ta,b", "h1\tc,d"])
    assert list(content(output, "train")) == ["a", "c", "d"]
    assert rejects(output) == [("3", "b", "sequence equal to an earlier one")]


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_the_real_uniref_sample(tmp_path, monkeypatch):
    monkeypatch.undo()
    config = PrepareConfig(
        input=str(SHARED / "uniref50_train_filt.fasta.gz"),
        output=str(tmp_path / "out"),
        members=str(SHARED / "ur90_ur50_sampler.fasta.gz"),
        mapping=str(SHARED / "mapping.tsv.gz"),
    )
    manifest = prepare(config)
    assert manifest["splits"]["train"]["records"] == 11_296 and manifest["rejects"] == {}
    with gzip.open(SHARED / "mapping.tsv.gz", "rt") as file:
        rows = [line.split("\t") for line in file][1:]
    of = {member: head for head, members in rows for member in members.strip().split(",")}
    store = Store.open(tmp_path / "out" / "train.arrow")
    names = store.ids(range(len(store)))
    assert len(store.clusters) == 5_001 and sorted(of) == sorted(names)
    owner = np.array([of[names[row]] for row in store.clusters.order])
    assert [len(set(owner[s : s + c])) for s, c in zip(store.clusters.start, store.clusters.count)] == [1] * 5_001


# ---- molecules


def test_molecules_are_canonical(tmp_path):
    pytest.importorskip("rdkit")
    (tmp_path / "m.smi").write_text("OCC a\nC(C)O b\nnonsense c\nc1ccccc1 d\nC1CC e\n")
    manifest = prepare(PrepareConfig(input=str(tmp_path / "m.smi"), output=str(tmp_path / "out"), variants=0))
    assert manifest["kind"] == "molecule" and Store.open(tmp_path / "out" / "train.arrow").alphabet == "molecule"
    assert content(tmp_path / "out", "train") == {"a": "CCO", "d": "c1ccccc1"}
    assert sorted(rejects(tmp_path / "out")) == [
        ("2", "b", "sequence equal to an earlier one"),
        ("3", "c", "RDKit cannot read this SMILES"),
        ("5", "e", "RDKit cannot read this SMILES"),
    ]


def test_molecules_without_rdkit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ValueError, match=r"pip install 'moltron\[molecules\]'"):
        run(tmp_path, [("a", "CCO")], kind="molecule")


# ---- errors and crashes


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"val_size": 1.5}, "val_size=1.5: a whole number counts"),
        ({"test_size": -1}, "test_size=-1"),
        ({"val_size": 3}, "take 3 of 3 distinct sequences"),
        ({"test_size": 0.1}, "test_size=0.1 of 3 distinct sequences is none: raise it, or leave it out"),
        ({"val_size": 1, "val_input": "x"}, "val_size and val_input are both set"),
        ({"members": "x"}, "members and mapping belong together"),
        ({"cluster_column": "x"}, "cluster_column is set without clusters"),
        ({"kind": "dna", "illegal": "y"}, "kind=dna: choose from protein, molecule; illegal=y"),
        ({"min_length": 5, "max_length": 4}, "min_length=5 <= max_length=4"),
        ({"min_length": 500}, "none of its 3 records can be used: .*shorter than min_length=500"),
        ({"test_input": "/nowhere"}, "no such file: /nowhere"),
    ],
)
def test_settings_that_cannot_be(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        run(tmp_path, made_up(3), **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.fasta"]


def test_no_records_at_all(tmp_path):
    (tmp_path / "empty.smi").touch()
    with pytest.raises(ValueError, match=r"empty\.smi holds no records"):
        prepare(PrepareConfig(input=str(tmp_path / "empty.smi"), output=str(tmp_path / "out")))


def test_existing_output_and_mixed_kinds(tmp_path):
    run(tmp_path, made_up(3))
    with pytest.raises(ValueError, match="overwrite=true"):
        run(tmp_path, made_up(4))
    assert len(content(tmp_path / "out", "train")) == 3
    (tmp_path / "m.smi").write_text("CCO a\n")
    with pytest.raises(ValueError, match=r"m\.smi looks like kind=molecule"):
        run(tmp_path, made_up(4), val_input=str(tmp_path / "m.smi"), overwrite=True)
    assert len(content(tmp_path / "out", "train")) == 3


def test_a_truncated_file_leaves_no_output(tmp_path):
    packed = gzip.compress("".join(f">{n}\n{s}\n" for n, s in made_up(500)).encode())
    (tmp_path / "in.fasta.gz").write_bytes(packed[:-200])
    with pytest.raises(ValueError, match=r"in\.fasta\.gz is truncated"):
        prepare(PrepareConfig(input=str(tmp_path / "in.fasta.gz"), output=str(tmp_path / "out")))
    assert [p.name for p in tmp_path.iterdir()] == ["in.fasta.gz"]


def test_kill_9_leaves_no_half_output(tmp_path):
    program = (
        "from moltron.data.prepare import prepare, spool\n"
        "from moltron.config.schema import PrepareConfig\n"
        "spool._BATCH_ROWS = 1\n"
        f"prepare(PrepareConfig(input='-', output={str(tmp_path / 'out')!r}))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
    assert child.stdin is not None
    text = "".join(f">{n}\n{s}\n" for n, s in made_up(3000)).encode()
    child.stdin.write(text)
    child.stdin.flush()
    stage = None
    while stage is None or not (stage / "spool.arrow").exists():
        assert child.poll() is None
        stage = next(tmp_path.glob(".out.partial-*"), None)
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert stage.exists() and not (tmp_path / "out").exists()
    done = subprocess.run([sys.executable, "-c", program], input=text, check=False)
    assert done.returncode == 0 and len(content(tmp_path / "out", "train")) == 3000
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


# ---- keys


def test_first_of_equals_and_lookup():
    some = np.random.default_rng(0).integers(0, 36, 300).astype(np.uint64)
    assert first_of_equals(some).tolist() == [some.tolist().index(key) for key in some.tolist()]
    assert first_of_equals(some[:0]).tolist() == []
    keys = keys_of(f"name{i % 50}" for i in range(100))
    lookup = Lookup(keys, np.arange(100) * 3)
    assert lookup.find(keys).tolist() == [3 * (i % 50) for i in range(100)]
    assert lookup.find(keys_of(["name", "x"])).tolist() == [-1, -1]
    assert lookup.find(keys[:5] + np.uint64(1)).tolist() == [-1] * 5
    assert Lookup(keys[:0], np.arange(0)).find(keys).tolist() == [-1] * 100
    assert keys_module.key(b"name7") == hashlib.blake2b(b"name7", digest_size=8).digest() == keys[7].tobytes()


def test_draw_is_even_and_disjoint():
    keys = keys_of(map(str, range(10_000)))
    counts = np.zeros(10_000)
    for seed in range(20):
        first, second = draw(keys, np.arange(10_000), seed, 1000, 2000)
        assert len(set(first) | set(second)) == 3000
        counts[first] += 1
    assert abs(counts[:5000].sum() - counts[5000:].sum()) < 600  # 20,000 draws: 4 standard deviations
    assert 0.05 < (counts == 0).mean() < 0.2  # 0.9 ** 20 = 0.12
