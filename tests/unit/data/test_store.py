"""The Arrow store: right letters, and nothing stale, changed or half written is ever read."""

import json
import os
import shutil
import stat

import numpy as np
import pyarrow as pa
import pytest

from moltron.common.manifest import write_json
from moltron.data.store import Clusters, Store, StoreWriter, describe

RNG = np.random.default_rng(0)
SEQUENCES = [bytes(RNG.choice(list(b"ACDEFGHIKL"), size).astype(np.uint8)) for size in RNG.integers(1, 90, 500)]
IDS = [f"id/{i} é" for i in range(500)]


def write(folder, sequences=SEQUENCES, name="train", batches=7, clusters=None, manifest=True):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.arrow"
    with StoreWriter(path) as writer:
        for rows in np.array_split(np.arange(len(sequences)), batches):
            writer.add([IDS[i] for i in rows], [sequences[i] for i in rows])
    if clusters:
        clusters.save(path)
    if manifest:
        write_json(folder / "manifest.json", {"splits": {name: {"files": describe(path)}}})
    return path


def letters(store, rows):
    return store.gather(rows, np.zeros(len(rows)), store.lengths[rows]).tobytes()


def test_gather_is_slicing(tmp_path):
    store = Store.open(write(tmp_path / "d"))
    assert len(store) == 500 and store.alphabet == "protein" and store.clusters is None
    assert store.lengths.dtype == np.int32 and store.lengths.tolist() == [len(s) for s in SEQUENCES]
    rows = RNG.integers(0, 500, 2000)
    starts = (RNG.random(2000) * store.lengths[rows]).astype(np.int64)
    lengths = (RNG.random(2000) * (store.lengths[rows] - starts + 1)).astype(np.int64)
    got = store.gather(rows, starts, lengths)
    expected = b"".join(SEQUENCES[r][s : s + n] for r, s, n in zip(rows, starts, lengths))
    assert got.dtype == np.uint8 and got.tobytes() == expected
    assert store.ids(rows) == [IDS[r] for r in rows]
    assert store.texts([499]) == [SEQUENCES[499].decode()] and store.gather([], [], []).shape == (0,)


@pytest.mark.parametrize(("row", "start", "length"), [(0, -1, 1), (0, 0, 91), (0, 1, 90), (500, 0, 1), (-1, 0, 1)])
def test_gather_refuses_to_leave_a_record(tmp_path, row, start, length):
    store = Store.open(write(tmp_path / "d"))
    with pytest.raises(IndexError):
        store.gather([row], [start], [length])


def test_other_programs_read_it(tmp_path):
    frame = pa.ipc.open_file(str(write(tmp_path / "d"))).read_pandas()
    assert frame["id"].tolist() == IDS and frame["sequence"].tolist() == [s.decode() for s in SEQUENCES]


@pytest.mark.parametrize("sequences", [[], [b""], [b"", b"A", b""]])
def test_empty_ones(tmp_path, sequences):
    store = Store.open(write(tmp_path / "d", sequences, batches=1))
    assert len(store) == len(sequences) and letters(store, np.arange(len(sequences))) == b"".join(sequences)
    assert store.ids([]) == []


def test_clusters(tmp_path):
    clusters = Clusters(np.array([0, 200]), np.array([200, 300]), RNG.permutation(500))
    path = write(tmp_path / "d", clusters=clusters)
    opened = Store.open(path).clusters
    assert len(opened) == 2 and all(np.array_equal(getattr(opened, k), v) for k, v in vars(clusters).items())
    np.save(path.with_name("train.clusters.order.npy"), np.arange(500))
    with pytest.raises(ValueError, match=r"clusters\.order\.npy is not what .*manifest\.json describes"):
        Store.open(path)
    path.with_name("train.clusters.order.npy").unlink()
    with pytest.raises(ValueError, match=r"clusters\.order\.npy is missing"):
        Store.open(path)


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_changed_byte_is_refused(tmp_path, opened_before):
    path = write(tmp_path / "d")
    if opened_before:
        Store.open(path)
    content = bytearray(path.read_bytes())
    content[content.index(SEQUENCES[250])] ^= 1
    path.write_bytes(bytes(content))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"train\.arrow is not what .* changed or damaged"):
            Store.open(path)


def test_a_change_with_forged_time_is_found_by_verify(tmp_path):
    path = write(tmp_path / "d")
    Store.open(path)
    times = path.stat()
    content = bytearray(path.read_bytes())
    content[content.index(SEQUENCES[250])] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    Store.open(path)  # stated: a file whose size and time are those of the stamp is not hashed again
    with pytest.raises(ValueError, match="changed or damaged"):
        Store.open(path, verify=True)


@pytest.mark.parametrize("manifest", [True, False])
def test_another_file_never_gets_the_old_index(tmp_path, manifest):
    path = write(tmp_path / "d", manifest=manifest)
    old = Store.open(path).fingerprint
    write(tmp_path / "d", [s[::-1] + b"W" for s in SEQUENCES], manifest=manifest)
    store = Store.open(path)
    assert store.fingerprint != old and letters(store, np.arange(500)) == b"".join(s[::-1] + b"W" for s in SEQUENCES)


@pytest.mark.parametrize("part", ["starts", "lengths"])
@pytest.mark.parametrize("damage", ["value", "cut", "rows"])
def test_a_damaged_index_is_made_again(tmp_path, part, damage):
    path = write(tmp_path / "d")
    Store.open(path)
    (file,) = path.parent.glob(f"train.*.{part}.npy")
    array = np.load(file)
    array[100] += 1
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    else:
        np.save(file, array if damage == "value" else array[:-1])
    assert letters(Store.open(path), np.arange(500)) == b"".join(SEQUENCES)


def test_opening_again_hashes_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "d")
    Store.open(path)
    monkeypatch.setattr("moltron.data.store.sha256_file", lambda file: pytest.fail(f"hashed {file}"))
    monkeypatch.setattr(Store, "_build_index", lambda *a: pytest.fail("index built again"))
    monkeypatch.setattr(Store, "_is_right", lambda *a: pytest.fail("index compared again"))
    Store.open(path)


def test_read_only_data_needs_and_uses_cache_dir(tmp_path, monkeypatch):
    """Read-only is made by an error on writing: tests may run as root, whom no mode stops."""
    first, second = write(tmp_path / "a"), write(tmp_path / "b", [s + b"W" for s in SEQUENCES])
    cache = tmp_path / "cache"
    build = Store._build_index

    def refuse(self, files, base):
        if cache not in files[0].parents:
            raise PermissionError(13, "Permission denied")
        build(self, files, base)

    def refuse_json(path, content):
        if cache not in path.parents:
            raise PermissionError(13, "Permission denied")
        write_json(path, content)

    monkeypatch.setattr(Store, "_build_index", refuse)
    monkeypatch.setattr("moltron.data.store.write_json", refuse_json)
    with pytest.raises(ValueError, match=r"Permission denied\): set data\.cache_dir"):
        Store.open(first)
    for _ in range(2):  # two stores of one name share the cache folder
        assert letters(Store.open(first, cache), np.arange(500)) == b"".join(SEQUENCES)
        assert letters(Store.open(second, cache), np.arange(500)) == b"".join(s + b"W" for s in SEQUENCES)
    assert [p.name for p in first.parent.iterdir() if "stamp" in p.name or p.suffix == ".npy"] == []
    monkeypatch.setattr("moltron.data.store.sha256_file", lambda file: pytest.fail(f"hashed {file}"))
    Store.open(first, cache), Store.open(second, cache)


def test_a_copy_is_the_same_store(tmp_path):
    path = write(tmp_path / "d")
    fingerprint = Store.open(path).fingerprint
    shutil.copytree(tmp_path / "d", tmp_path / "e", copy_function=shutil.copyfile)  # times of change are new
    copy = Store.open(tmp_path / "e" / "train.arrow")
    assert copy.fingerprint == fingerprint and letters(copy, np.arange(500)) == b"".join(SEQUENCES)


def test_what_is_no_store_is_refused(tmp_path):
    path = write(tmp_path / "d", manifest=False)
    with pytest.raises(ValueError, match=r"val\.arrow does not exist: .* has train\.arrow"):
        Store.open(tmp_path / "d" / "val.arrow")
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="not a whole"):
        Store.open(path)
    for name, table, options in [
        ("columns", pa.table({"a": ["x"]}), None),
        ("nulls", pa.table({"id": ["x"], "sequence": pa.array([None], pa.string())}), None),
        ("lz4", pa.table({"id": ["x"] * 99, "sequence": ["A" * 99] * 99}), pa.ipc.IpcWriteOptions(compression="lz4")),
    ]:
        with pa.ipc.new_file(str(tmp_path / "d" / f"{name}.arrow"), table.schema, options=options) as writer:
            writer.write_table(table)
        with pytest.raises(ValueError, match="prepare it again"):
            Store.open(tmp_path / "d" / f"{name}.arrow")


def test_stamp_is_json_and_a_damaged_one_harmless(tmp_path):
    path = write(tmp_path / "d")
    Store.open(path)
    stamp = path.with_name("train.stamp.json")
    assert json.loads(stamp.read_text())["train.arrow"][0] == path.stat().st_size
    assert stat.S_ISREG(stamp.stat().st_mode)
    stamp.write_text("{")
    assert letters(Store.open(path), np.arange(500)) == b"".join(SEQUENCES)


def test_tokens_rule_lengths_and_gather(tmp_path):
    with StoreWriter(tmp_path / "train.arrow", "molecule", tokens=True) as writer:
        writer.add(["a", "b"], ["C[nH]", "CC"], [b"\x01\x0f", b"\x01\x01"])
        writer.add(["c"], ["[C@H]Br"], [b"\x00\xfb"])
        writer.add([], [], [])
    for _ in range(2):  # the index is built, then found
        store = Store.open(tmp_path / "train.arrow")
        assert store.has_tokens and store.alphabet == "molecule" and store.lengths.tolist() == [2, 2, 2]
        found = store.gather(np.array([2, 0, 1]), np.array([0, 1, 0]), np.array([2, 1, 2]))
        assert found.tolist() == [0, 251, 15, 1, 1]
        assert store.texts(range(3)) == ["C[nH]", "CC", "[C@H]Br"]
    with pytest.raises(IndexError):  # the text is longer than the tokens
        store.gather(np.array([0]), np.array([0]), np.array([3]))
    with pytest.raises(IndexError):
        store.texts([3])


def test_a_third_column_of_another_kind_is_refused(tmp_path):
    columns = {"id": ["a"], "sequence": ["C"], "tokens": ["C"]}
    table = pa.table(columns)
    with pa.OSFile(str(tmp_path / "t.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ValueError, match="third column tokens, binary"):
        Store.open(tmp_path / "t.arrow")


def test_equal_clusters_are_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("moltron.data.store._CHUNK", 4)
    Clusters.save_equal(tmp_path / "t.arrow", 5, 3)
    parts = [np.load(tmp_path / f"t.clusters.{part}.npy") for part in ("start", "count", "order")]
    assert [part.dtype for part in parts] == [np.int64] * 3
    assert parts[0].tolist() == [0, 3, 6, 9, 12] and parts[1].tolist() == [3] * 5
    assert parts[2].tolist() == list(range(15))
