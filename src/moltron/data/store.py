"""Prepared sequences on disk: one Arrow IPC file a split, read by memory map, N records in flat memory.

    DIR/manifest.json                        counts, settings, the SHA-256 of every file below
    DIR/train.arrow                          columns id, sequence (plain strings: pandas, polars and duckdb read it)
    DIR/train.clusters.{start,count,order}.npy    where there are clusters
    DIR/train.<sha>.{starts,lengths}.npy     index: where each sequence lies in the file; beside it or in cache_dir
    DIR/train.stamp.json                     size and time of the files whose hash was seen to be right

    Store.open ──hash──> map ──> gather(rows, starts, lengths) -> letters

What is trusted: a file is hashed in full (about 1 GB/s) when it is new, was copied or touched, i.e. when its size or
time of change is not the stamp's; otherwise it is taken to be what it was, so opening 20 GB is immediate. `verify=True`
always hashes. A file whose hash is not the manifest's is refused. The index has the hash of the file it describes in
its name, so a stale one is never found, and one that the stamp does not know is compared with the file's own offsets.
Knows nothing of tokens, batches and order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moltron.common.manifest import read_json, sha256_file, write_json

MANIFEST = "manifest.json"
BATCH_BYTES = 8 << 20  # letters in one record batch
CLUSTER_PARTS = ("start", "count", "order")


def schema(alphabet: str) -> pa.Schema:
    fields = [pa.field("id", pa.string(), nullable=False), pa.field("sequence", pa.string(), nullable=False)]
    return pa.schema(fields, metadata={"moltron.alphabet": alphabet})


class StoreWriter:
    """Writes one .arrow file, batch by batch. The manifest and index come from `describe` and from opening it."""

    def __init__(self, path: str | Path, alphabet: str = "protein") -> None:
        self.path = Path(path)
        self._schema = schema(alphabet)
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def add(self, ids: Iterable[str], sequences: Iterable[bytes | str]) -> None:
        """One record batch: at most 2 GiB of letters, some MB are best."""
        self.add_columns(pa.array(ids, pa.string()), pa.array(sequences, pa.string()))

    def add_columns(self, ids: pa.Array, sequences: pa.Array) -> None:
        self._writer.write_batch(pa.record_batch([ids, sequences], schema=self._schema))

    def close(self) -> None:
        self._writer.close()
        self._file.close()  # the writer leaves it open

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def describe(path: str | Path) -> dict[str, Any]:
    """The manifest's entry of one finished split: {file: {"bytes", "sha256"}} of the .arrow and its cluster files."""
    path = Path(path)
    files = [path, *(file for file in _cluster_files(path) if file.is_file())]
    return {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files}


@dataclass(frozen=True)
class Clusters:
    """C clusters over N records: the members of cluster c are rows `order[start[c] : start[c] + count[c]]`."""

    start: np.ndarray  # (C,) int64
    count: np.ndarray  # (C,) int64, each at least 1
    order: np.ndarray  # (N,) int64, a permutation of the rows

    def __len__(self) -> int:
        return len(self.start)

    def save(self, path: str | Path) -> None:
        """Beside the .arrow file `path`."""
        for part, file in zip(CLUSTER_PARTS, _cluster_files(Path(path))):
            np.save(file, getattr(self, part))


class Store:
    """One split, opened.

    lengths: (N,) int32, letters a record; clusters: Clusters or None; fingerprint: hex SHA-256 of the .arrow file;
    alphabet: "protein" or "molecule".
    """

    @classmethod
    def open(cls, path: str | Path, cache_dir: str | Path | None = None, verify: bool = False) -> Store:
        """path: the .arrow file; cache_dir: where index and stamp go if its folder cannot be written to.

        Raises: ValueError where there is no such file, its content is not the manifest's, it is not a file of ours,
        or its index can be written nowhere.
        """
        return cls(Path(path), None if cache_dir is None else Path(cache_dir), verify)

    def __init__(self, path: Path, cache_dir: Path | None, verify: bool) -> None:
        if not path.is_file():
            there = sorted(p.name for p in path.parent.glob("*.arrow")) if path.parent.is_dir() else []
            raise ValueError(f"{path} does not exist: {path.parent} has {', '.join(there) or 'no .arrow files'}")
        self.path = path
        homes = [path.parent, *([cache_dir] if cache_dir else [])]
        trust = _Trust(path, homes)
        self.fingerprint = trust.sha256(path, verify)
        self._map = pa.memory_map(str(path))
        view = self._map.read_buffer(self._map.size())
        self._view = memoryview(view)
        try:
            reader = pa.ipc.open_file(self._map)
            self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a whole, uncompressed Arrow file ({error}): prepare it again") from error
        self._check_columns(reader.schema)
        self.alphabet = (reader.schema.metadata or {}).get(b"moltron.alphabet", b"protein").decode()
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)])
        self._starts, self.lengths = self._open_index(homes, trust, view.address)
        self.clusters = None
        files = _cluster_files(path)
        if any(file.is_file() for file in files) or trust.expects(files[0]):
            for file in files:
                trust.sha256(file, verify)
            self.clusters = Clusters(*(np.load(file, mmap_mode="r") for file in files))
        trust.save()

    def __len__(self) -> int:
        return int(self._first[-1])

    def ids(self, rows: Iterable[int]) -> list[str]:
        rows = np.asarray(rows, dtype=np.int64)
        self._check_rows(rows)
        batch = np.searchsorted(self._first, rows, side="right") - 1
        result = np.empty(len(rows), dtype=object)
        for index in np.unique(batch):
            here = batch == index
            result[here] = self._batches[index].column(0).take(pa.array(rows[here] - self._first[index])).to_pylist()
        return result.tolist()

    def gather(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Letters `starts[i] … starts[i] + lengths[i]` of record `rows[i]`, one after the other -> (Σ lengths,) uint8.

        Raises: IndexError where that leaves a record.
        """
        rows, starts, lengths = (np.asarray(a, dtype=np.int64) for a in (rows, starts, lengths))
        self._check_rows(rows)
        if np.any((starts < 0) | (lengths < 0) | (starts + lengths > self.lengths[rows])):
            raise IndexError(f"{self.path}: a crop leaves its record")
        begins = self._starts[rows] + starts
        # slices of the map, joined in one copy: 200 million letters a second, and no index array of 8 bytes a letter
        crops = [self._view[a:b] for a, b in zip(begins.tolist(), (begins + lengths).tolist())]
        return np.frombuffer(bytearray().join(crops), dtype=np.uint8)

    def sequence(self, row: int) -> bytes:
        return self.gather(np.array([row]), np.array([0]), self.lengths[[row]]).tobytes()

    def _check_rows(self, rows: np.ndarray) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"{self.path} has rows 0 … {len(self) - 1}, not {rows.min()} … {rows.max()}")

    def _check_columns(self, found: pa.Schema) -> None:
        if found.names[:2] != ["id", "sequence"] or any(found.field(i).type != pa.string() for i in (0, 1)):
            raise ValueError(
                f"{self.path}: expected string columns id, sequence, found {found.names}: prepare it again"
            )
        if any(batch.column(i).null_count for batch in self._batches for i in (0, 1)):
            raise ValueError(f"{self.path} has empty (null) cells: prepare it again")

    def _open_index(self, homes: list[Path], trust: _Trust, base: int) -> tuple[np.ndarray, np.ndarray]:
        """-> starts (N,) int64, bytes from the file's beginning, and lengths (N,) int32; built where there is none."""
        names = [f"{self.path.stem}.{self.fingerprint[:16]}.{part}.npy" for part in ("starts", "lengths")]
        problems = []
        for home in homes:
            files = [home / name for name in names]
            index = self._load_index(files)
            if index is not None and (all(map(trust.knows, files)) or self._is_right(index, base)):
                return index
            try:
                self._build_index(files, base)
            except OSError as error:
                problems.append(f"{home}: {error.strerror}")
                continue
            for file in files:
                trust.note(file)
            index = self._load_index(files)
            assert index is not None
            return index
        raise ValueError(
            f"{self.path} needs an index and it can be written nowhere ({'; '.join(problems)}): set cache_dir"
        )

    def _load_index(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray] | None:
        try:
            starts, lengths = (np.load(file, mmap_mode="r" if len(self) else None) for file in files)
        except (OSError, ValueError):
            return None
        return (starts, lengths) if starts.shape == lengths.shape == (len(self),) else None

    def _spans(self, base: int) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """A record batch at a time: its rows, where they start in the file, their lengths."""
        for first, batch in zip(self._first, self._batches):
            column = batch.column(1)
            if not len(column):
                continue
            _, offsets, letters = column.buffers()
            place = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1].astype(np.int64)
            address = letters.address if letters is not None and letters.size else base
            if not base <= address <= base + len(self._view):
                raise ValueError(f"{self.path} is compressed: prepare it again, or write it without compression")
            yield slice(first, first + len(column)), place[:-1] + (address - base), np.diff(place).astype(np.int32)

    def _is_right(self, index: tuple[np.ndarray, np.ndarray], base: int) -> bool:
        spans = self._spans(base)
        return all(np.array_equal(index[0][r], s) and np.array_equal(index[1][r], n) for r, s, n in spans)

    def _build_index(self, files: list[Path], base: int) -> None:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        partial = [file.with_name(f"{file.name}.partial-{os.getpid()}") for file in files]
        if len(self):
            make = np.lib.format.open_memmap
            starts, lengths = (make(f, "w+", kind, (len(self),)) for f, kind in zip(partial, (np.int64, np.int32)))
            for rows, begins, sizes in self._spans(base):
                starts[rows], lengths[rows] = begins, sizes
            starts.flush()
            lengths.flush()
        else:  # a memory map cannot be empty
            for file in partial:
                with open(file, "wb") as handle:
                    np.save(handle, np.empty(0, np.int64))
        for file, final in zip(partial, files):
            os.replace(file, final)


class _Trust:
    """Says what a file's hash is, hashing only where no stamp knows the file as it now is."""

    def __init__(self, path: Path, homes: list[Path]) -> None:
        manifest = path.parent / MANIFEST
        splits = read_json(manifest).get("splits", {}) if manifest.is_file() else {}
        self._expected = splits.get(path.stem, {}).get("files", {})
        # one cache folder may serve many stores: there the stamp's name holds the store's place
        place = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=8).hexdigest()
        names = [f"{path.stem}.stamp.json", *[f"{path.stem}.{place}.stamp.json"] * (len(homes) - 1)]
        self._stamps = [home / name for home, name in zip(homes, names)]
        self._known: list[dict[str, Any]] = []  # {file name: [bytes, time of change, SHA-256]}, one a stamp
        for stamp in self._stamps:
            try:
                self._known.append(read_json(stamp))
            except (OSError, ValueError):
                continue  # without a stamp, or with a damaged one, the file is hashed
        self._new: dict[str, Any] = {}

    def expects(self, file: Path) -> bool:
        return file.name in self._expected

    def knows(self, file: Path) -> list[Any] | None:
        state = _state(file)
        return next((k[file.name] for k in self._known if k.get(file.name, [])[:2] == state), None)

    def note(self, file: Path, sha256: str | None = None) -> None:
        self._new[file.name] = [*_state(file), sha256]

    def sha256(self, file: Path, verify: bool) -> str:
        if not file.is_file():
            raise ValueError(f"{file} is missing, {file.parent / MANIFEST} names it: copy or prepare it again")
        expected = self._expected.get(file.name, {}).get("sha256")
        known = self.knows(file)
        if known and not verify and expected in (None, known[2]):
            return known[2]
        found = sha256_file(file)
        if expected not in (None, found):
            raise ValueError(
                f"{file} is not what {file.parent / MANIFEST} describes (SHA-256 {found[:16]}… instead of "
                f"{expected[:16]}…): it was changed or damaged after it was prepared; copy or prepare it again"
            )
        self.note(file, found)
        return found

    def save(self) -> None:
        for stamp in self._stamps if self._new else []:
            try:
                stamp.parent.mkdir(parents=True, exist_ok=True)
                write_json(stamp, {**(self._known[0] if self._known else {}), **self._new})
            except OSError:
                continue  # read-only: the next home; with none, every opening hashes again
            break


def _state(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


def _cluster_files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.stem}.clusters.{part}.npy") for part in CLUSTER_PARTS]
