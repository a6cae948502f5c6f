"""`moltron embed`: every format holds every record in order; nothing is lost to a crash; odd records are named."""

import csv
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, safe_open

from moltron import load_model
from moltron.checkpoint.weights import save_pretrained
from moltron.cli.main import main
from moltron.config.schema import EmbedConfig
from moltron.infer import bulk
from moltron.infer.bulk import embed
from moltron.infer.writers import group_name
from moltron.models.registry import build_model, get_spec

FORMATS = ("npz", "safetensors", "h5", "parquet", "pkl")
RESIDUES = np.array(list("ACDEFGHIKLMNPQRSTVWY"))


def random_records(lengths, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [(f"P{i:05d}", "".join(rng.choice(RESIDUES, n))) for i, n in enumerate(lengths)]


RECORDS = random_records([5, 64, 1, 30, 30, 12, 47, 3, 60, 22, 9])
ODD = [
    ("a/b", "MKT"),
    ("a%2Fb", "MKV"),
    ("..", "MKL"),
    ("ü|é", "MKI"),
    ("ids", "MKF"),
    ("twice", "MKY"),
    ("twice", "MK"),
]


def read_any(path: str) -> dict:
    """{"ids", "settings", then each output: an array, or a list of arrays where it is ragged}, of any format."""
    suffix = Path(path).suffix
    if suffix == ".pkl":
        with open(path, "rb") as file:
            records = pickle.load(file)
        ids = {"ids": [r["id"] for r in records], "sequences": [r["sequence"] for r in records]}
        keys = [key for key in records[0] if key not in ("id", "sequence")]
        return ids | {k: [r[k] for r in records] if k[0] != "e" else np.stack([r[k] for r in records]) for k in keys}
    if suffix == ".parquet":
        table = pq.read_table(path)
        result = {"ids": table["id"].to_pylist(), "settings": json.loads(table.schema.metadata[b"moltron"])}
        for name in table.column_names[1:]:
            rows = [np.stack(x) if name[0] != "e" else np.array(x) for x in table[name].to_pandas()]
            result[name] = np.stack(rows) if name[0] == "e" else rows
        return result
    if suffix == ".h5":
        with h5py.File(path) as file:
            result = {"ids": list(file["ids"].asstr()), "settings": json.loads(file.attrs["moltron"])}
            result |= {name: file[name][:] for name in file if name not in ("ids", "sequences")}
            seen: dict[str, int] = {}
            for record_id in result["ids"] if "sequences" in file else ():
                seen[record_id] = seen.get(record_id, 0) + 1
                suffix = f"#{seen[record_id]}" if seen[record_id] > 1 else ""
                group = file["sequences"][group_name(record_id) + suffix]
                assert group.attrs["original_id"] == record_id
                for name in group:
                    result.setdefault(name, []).append(group[name][:])
        return result
    if suffix == ".npz":
        arrays = dict(np.load(path, allow_pickle=False))
        ids, settings = arrays.pop("ids").tolist(), json.loads(str(arrays.pop("settings")))
    else:
        arrays = load_file(path)
        with safe_open(path, "np") as file:
            settings = json.loads(file.metadata()["moltron"])
        packed = arrays.pop("ids")
        ids = [x.decode() for x in packed.view(f"S{packed.shape[1]}").ravel().tolist()]
    offsets = arrays.pop("offsets", None)
    ragged = {k: np.split(v, offsets[1:-1]) if k[0] != "e" else v for k, v in arrays.items()}
    return {"ids": ids, "settings": settings, **ragged}


@pytest.fixture
def run(model_folder, fasta, tmp_path):
    """Embed records with 64-residue limit, three records a shard, into tmp_path/name."""

    def call(records, name: str = "out.npz", **keys):
        config = EmbedConfig(
            model=model_folder, input=fasta(records), output=str(tmp_path / name), device="cpu", shard_size=3
        )
        config = dataclasses.replace(config, **keys)
        return config.output, embed(config)

    return call


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("layers", [[-1], [0, -1]])
def test_every_format_holds_everything_in_order(run, model_folder, suffix, layers):
    records = RECORDS + ODD
    path, report = run(records, f"out.{suffix}", outputs=["embeddings", "hiddens", "logits"], layers=layers)
    result = read_any(path)
    assert result["ids"] == [record_id for record_id, _ in records]
    assert (report.sequences, report.rejected, report.shards) == (18, 0, 6)
    model, sequences = load_model(model_folder, "cpu"), [sequence for _, sequence in records]
    for layer in layers:
        ending = "" if len(layers) == 1 else f"_{layer % 3}"
        assert np.array_equal(result["embeddings" + ending], model.embed(sequences, layer=layer))
        assert result["embeddings" + ending].dtype == np.float32
        for got, expected in zip(result["hiddens" + ending], model.hiddens(sequences, layer=layer), strict=True):
            assert np.array_equal(got, expected)
    for got, expected in zip(result["logits"], model.logits(sequences), strict=True):
        assert np.array_equal(got, expected)
    if suffix == "pkl":
        assert result["sequences"] == sequences
    else:
        assert result["settings"]["pooling"] == "mean" and result["settings"]["long"] == "error"
        assert result["settings"]["layers"] == [layer % 3 for layer in layers]
    assert not os.path.exists(path + ".shards") and not os.path.exists(path + ".rejects.tsv")


def test_the_pickle_is_version_ones(run):
    path, _ = run(RECORDS, "out.pkl")
    with open(path, "rb") as file:
        records = pickle.load(file)
    assert type(records) is list and len(records) == len(RECORDS)
    for record, (record_id, sequence) in zip(records, RECORDS, strict=True):
        assert type(record) is dict and set(record) == {"sequence", "id", "embeddings"}
        assert (record["id"], record["sequence"]) == (record_id, sequence)
        assert record["embeddings"].dtype == np.float32 and record["embeddings"].shape == (48,)
    path, _ = run(RECORDS, "two.pkl", outputs=["embeddings", "hiddens"])
    with open(path, "rb") as file:
        record = pickle.load(file)[1]
    assert set(record) == {"sequence", "id", "embeddings", "hiddens"}
    assert record["hiddens"].dtype == np.float32 and record["hiddens"].shape == (64, 48)


@pytest.mark.parametrize("suffix", FORMATS)
def test_half_width_and_one_output_alone(run, suffix):
    path, _ = run(RECORDS, f"out.{suffix}", outputs=["embeddings"], pooling="cls", dtype="float16")
    result = read_any(path)
    assert result["embeddings"].dtype == np.float16 and set(result) - {"settings", "sequences"} == {"ids", "embeddings"}


def test_long_records_are_rejected_truncated_or_windowed(run, model_folder):
    long = "ACDEFGHIKLMNPQRSTVWY" * 10
    records = [("short", "MKT"), ("long", long), ("end", "GG")]
    model = load_model(model_folder, "cpu")
    path, report = run(records)
    assert (report.sequences, report.rejected) == (2, 1)
    result = read_any(path)
    assert result["ids"] == ["short", "end"] and np.array_equal(result["embeddings"], model.embed(["MKT", "GG"]))
    lines = Path(path + ".rejects.tsv").read_text().splitlines()
    assert lines[0] == "source\tline\tid\treason" and len(lines) == 2
    assert "\t3\tlong\t200 residues, the model reads 64" in lines[1]
    for policy in ("truncate", "window"):
        path, report = run(records, f"{policy}.npz", long=policy, overlap=16, outputs=["embeddings", "hiddens"])
        assert (report.sequences, report.rejected, report.long) == (3, 0, 1)
        result = read_any(path)
        expected = model.hiddens([long], long=policy, overlap=16)[0]
        assert np.array_equal(result["hiddens"][1], expected)
        assert len(expected) == (64 if policy == "truncate" else 200)
        assert (result["settings"]["long"], result["settings"]["overlap"]) == (
            policy,
            16 if policy == "window" else None,
        )
        assert not os.path.exists(path + ".rejects.tsv")
    path, report = run(records, "default.npz", long="window")  # 32 of 64: half a window, for 128 would not fit
    assert read_any(path)["settings"]["overlap"] == 32
    assert np.array_equal(read_any(path)["embeddings"][1], model.embed([long], long="window")[0])
    path, report = run(records, "shorter.npz", max_length=12, long="truncate")
    assert np.array_equal(read_any(path)["embeddings"][1], model.embed([long[:10]])[0])


def test_bad_records_are_named_and_the_exit_code_is_3(model_folder, tmp_path, capsys):
    source = tmp_path / "in [1].csv"
    source.write_bytes(b'id,sequence,more\nA,mkt*,1\nB,---,2\nC\nD,MKV,3\n\xff\n"tab\t"",here"\n')
    output = str(tmp_path / "out,=.h5")
    arguments = ["embed", f"model={model_folder}", f"input={source}", f"output={output}", "device=cpu"]
    assert main(arguments) == 3
    assert read_any(output)["ids"] == ["A", "D"]
    with open(output + ".rejects.tsv", encoding="utf-8", newline="") as file:
        rejects = [(row["id"], row["line"]) for row in csv.DictReader(file, delimiter="\t")]
    assert rejects == [("B", "3"), ("C", "4"), ("?", "6"), ('tab\t",here', "7")]
    source.write_text("id,sequence\nA,MKT\n")
    assert main([*arguments, "overwrite=true"]) == 0
    assert read_any(output)["ids"] == ["A"] and not os.path.exists(output + ".rejects.tsv")


def test_the_command_says_what_it_did_without_a_terminal(model_folder, fasta, tmp_path):
    keys = [f"model={model_folder}", f"input={fasta([('a', 'MKJ')])}", "device=cpu"]
    for command in (["embed", *keys, f"output={tmp_path}/said.npz"], ["evaluate", *keys]):
        said = subprocess.run([sys.executable, "-m", "moltron", *command], capture_output=True, text=True).stderr
        assert ("1 sequences in" if command[0] == "embed" else "1 odd letters were mended") in said


def test_equal_sequences_of_a_shard_are_embedded_once(run, monkeypatch):
    seen = []
    original = bulk.Model.run
    monkeypatch.setattr(bulk.Model, "run", lambda self, s, *a, **k: seen.append(list(s)) or original(self, s, *a, **k))
    path, _ = run([("a", "MKT"), ("b", "MKV"), ("c", "MKT"), ("d", "MKT")])
    assert seen == [[b"MKT", b"MKV"], [b"MKT"]]
    vectors = read_any(path)["embeddings"]
    assert np.array_equal(vectors[0], vectors[2]) and np.array_equal(vectors[0], vectors[3])
    assert not np.array_equal(vectors[0], vectors[1])


def test_an_output_that_exists_is_left_alone(run):
    path, _ = run(RECORDS)
    before = Path(path).read_bytes()
    with pytest.raises(ValueError, match=r"out.npz exists.*overwrite=true"):
        run(RECORDS[:3])
    assert Path(path).read_bytes() == before and not os.path.exists(path + ".shards")
    run(RECORDS[:3], overwrite=True)
    assert len(read_any(path)["ids"]) == 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(name="out.txt"), "must end in one of"),
        (dict(outputs=["vectors"], pooling="median", layers=[]), "vectors.*median.*layers"),
        (dict(layers=[7]), "layers: 7"),
        (dict(long="window", overlap=64), "overlap=64"),
        (dict(max_length=2), "max_length=2"),
        (dict(dtype="int8"), "dtype=int8"),
        (dict(device="gpu"), "device=gpu: there are auto, cpu, cuda"),
        (dict(device="cpu:7"), "device=cpu:7"),
    ],
)
def test_settings_that_cannot_work_leave_nothing_behind(run, tmp_path, keys, message):
    with pytest.raises(ValueError, match=message):
        run(RECORDS, **keys)
    assert {path.name for path in tmp_path.iterdir()} == {"input.fasta"}


class Crash(BaseException):
    """As a kill -9: no `except Exception` sees it."""


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_same_command_continues_after_a_crash_at_any_rename(run, monkeypatch, tmp_path, after, overwrite):
    records = [*RECORDS, ("long", "A" * 65)]
    keys = dict(outputs=["embeddings", "hiddens"], overwrite=overwrite)
    expected = Path(run(records, "whole.npz", **keys)[0]).read_bytes()
    replace = os.replace
    crashes = 0
    while True:
        left = crashes + 1

        def replace_or_crash(source, target):
            nonlocal left
            left -= 1
            if left or after:
                replace(source, target)
            if not left:
                raise Crash

        name = f"out{crashes}.npz"
        monkeypatch.setattr(os, "replace", replace_or_crash)
        try:
            run(records, name, **keys)
            crashed = False
        except Crash:
            crashed = True
        monkeypatch.setattr(os, "replace", replace)
        if not crashed:
            break
        crashes += 1
        path, report = run(records, name, **keys)
        assert Path(path).read_bytes() == expected
        assert report.rejected == 1 and report.sequences == len(RECORDS) and report.shards == 4
        assert not os.path.exists(path + ".shards") and os.path.exists(path + ".rejects.tsv")
        assert report.reused == min(4, crashes - 1 + after) or crashes > 4
    assert crashes == 4 + 1 + (not overwrite) + 1  # shards, rejects, marker, output


def test_killed_in_mid_run_it_continues(run, model_folder, fasta, tmp_path):
    records = random_records([40] * 1000, seed=5)
    arguments = dict(shard_size=5, outputs=["embeddings", "hiddens"])
    config = dict(model=model_folder, input=fasta(records, "many.fasta"), output=str(tmp_path / "killed.npz"))
    code = (
        "from moltron.config.schema import EmbedConfig; from moltron.infer.bulk import embed\n"
        f"embed(EmbedConfig(**{config | arguments | {'device': 'cpu'}}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    shards = tmp_path / "killed.npz.shards"
    while process.poll() is None and len(list(shards.glob("*.parquet"))) < 5:
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match=f"killed.npz.lock is held by process {process.pid}"):
        run(records, "killed.npz", **arguments)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    found = len(list(shards.glob("*.parquet")))
    assert 5 <= found < 200
    killed, report = run(records, "killed.npz", **arguments)
    whole, _ = run(records, "whole.npz", **arguments)
    assert report.reused == found
    assert Path(killed).read_bytes() == Path(whole).read_bytes()


def crash_after_shards(run, monkeypatch, records, **keys) -> None:
    """Leave the shards of a run behind, without its output."""
    monkeypatch.setattr(bulk, "write_output", lambda *_: (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        run(records, **keys)
    monkeypatch.undo()


def test_shards_of_other_settings_or_records_are_not_used(run, monkeypatch):
    crash_after_shards(run, monkeypatch, RECORDS)
    path, report = run(RECORDS, pooling="cls")
    assert report.reused == 0
    os.remove(path)
    crash_after_shards(run, monkeypatch, RECORDS)
    changed = [*RECORDS[:4], ("P00004", "MKTMKT"), *RECORDS[5:9]]  # the second shard differs, the last is gone
    path, report = run(changed)
    assert (report.shards, report.reused) == (3, 2)
    assert read_any(path)["ids"] == [record_id for record_id, _ in changed]
    os.remove(path)
    assert np.array_equal(read_any(run(changed)[0])["embeddings"], read_any(run(changed, "again.npz")[0])["embeddings"])


def test_a_damaged_shard_is_made_again(run, monkeypatch, tmp_path):
    crash_after_shards(run, monkeypatch, RECORDS)
    shard = tmp_path / "out.npz.shards" / "000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    path, report = run(RECORDS)
    assert report.reused == 3 and np.array_equal(
        read_any(path)["embeddings"], read_any(run(RECORDS, "whole.npz")[0])["embeddings"]
    )


def test_shards_hold_a_bounded_number_of_bytes(run, monkeypatch):
    monkeypatch.setattr(bulk, "SHARD_BYTES", 48 * 4 * 100)
    _, report = run(random_records([60] * 9), outputs=["hiddens"], shard_size=100)
    assert report.shards == 5  # two records of 60 residues a shard
    _, report = run(random_records([60] * 9), "embeddings.npz", shard_size=100)
    assert report.shards == 1


def test_row_groups_are_bounded(run, monkeypatch):
    monkeypatch.setattr("moltron.infer.writers.GROUP_BYTES", 20_000)
    path, _ = run(RECORDS, "out.parquet", outputs=["embeddings", "hiddens"], shard_size=100)
    assert pq.read_metadata(path).num_row_groups > 2
    monkeypatch.undo()
    whole, _ = run(RECORDS, "whole.parquet", outputs=["embeddings", "hiddens"], shard_size=100)
    assert pq.read_metadata(whole).num_row_groups == 1
    first, second = read_any(path), read_any(whole)
    assert first["ids"] == second["ids"] and np.array_equal(first["embeddings"], second["embeddings"])
    assert all(np.array_equal(a, b) for a, b in zip(first["hiddens"], second["hiddens"], strict=True))


def test_cls_is_refused_where_no_token_stands_before_a_sequence(run, tmp_path):
    sizes = dict(hidden_size=16, num_layers=1, num_decoder_layers=0, num_heads=2, ffn_size=16)
    model = build_model("prott5", sizes, "cpu")
    model.init_weights(0)
    folder = str(save_pretrained(model, get_spec("prott5"), model.config, tmp_path / "t5"))
    with pytest.raises(ValueError, match="prott5 puts no token before a sequence"):
        run(RECORDS, model=folder, pooling="cls")
    run(RECORDS, model=folder, outputs=["hiddens"], pooling="cls")  # pools nothing


def test_nothing_to_embed(run, tmp_path):
    path, report = run([("long", "A" * 65)], outputs=["embeddings", "hiddens"])
    assert report.rejected == 1 and read_any(path)["embeddings"].shape == (0, 48)
    (tmp_path / "empty.csv").write_text("id,sequence\n")
    with pytest.raises(ValueError, match="no records"):
        run([("a", "MKT")], "empty.npz", input=str(tmp_path / "empty.csv"))
    assert not (tmp_path / "empty.npz.shards").exists()
