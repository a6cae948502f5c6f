"""Prepared sequences on disk: one Arrow IPC file a split, read by memory map, N records in flat memory.

    DIR/manifest.json                        counts, settings, the SHA-256 of every file below
    DIR/train.arrow                          columns id, sequence (plain strings: pandas, polars and duckdb read it);
                                             molecules: tokens too, binary, one byte a token (tokenizers: codes)
    DIR/train.clusters.{start,count,order}.npy    where there are clusters
    DIR/train.<sha>.{starts,lengths}.npy     index: where each sequence (or its tokens) lies; here or in cache_dir
    DIR/train.stamp.json                     size and time of the files whose hash was seen to be right; likewise

    Store.open ──hash──> map ──> gather(rows, starts, lengths) -> letters, or codes where there is a column tokens

What is trusted: a file is hashed in full (about 1 GB/s) when it is new, was copied or touched, i.e. when its size or
time of change is not the stamp's; otherwise it is taken to be what it was, so opening 20 GB is immediate. `verify=True`
always hashes. A file whose hash is not the manifest's is refused. The index has the hash of the file it describes in
its name, so a stale one is never found, and one that the stamp does not know is compared with the file's own offsets.
Knows nothing of ids, batches and order.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from moltron.common.manifest import read_json, sha256_file, staged_file, write_json

MANIFEST = "manifest.json"
_CHUNK = 1 << 20  # numbers written at a time


class StoreWriter:
    """Writes one .arrow file, batch by batch. The manifest and index come from `describe` and from opening it."""

    def __init__(self, path: str | Path, alphabet: str = "protein", tokens: bool = False) -> None:
        """tokens: with a third column, which add() must then be given."""
        fields = [pa.field(name, pa.string(), nullable=False) for name in ("id", "sequence")]
        fields += [pa.field("tokens", pa.binary(), nullable=False)] if tokens else []
        self._schema = pa.schema(fields, metadata={"moltron.alphabet": alphabet})
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, self._schema)

    def add(
        self,
        ids: Iterable[str] | pa.Array,
        sequences: Iterable[bytes | str] | pa.Array,
        tokens: Iterable[bytes] | pa.Array | None = None,
    ) -> None:
        """One record batch: at most 2 GiB of letters, some MB are best."""
        columns = [ids, sequences] if tokens is None else [ids, sequences, tokens]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()
        self._file.close()  # the writer leaves it open


def describe(path: str | Path) -> dict[str, Any]:
    """The manifest's entry of one finished split: {file: {"bytes", "sha256"}} of the .arrow and its cluster files."""
    files = [Path(path), *(file for file in _cluster_files(Path(path)) if file.is_file())]
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
        for file, part in zip(_cluster_files(Path(path)), (self.start, self.count, self.order)):
            np.save(file, part)

    @staticmethod
    def save_equal(path: str | Path, count: int, size: int) -> None:
        """`count` clusters of `size` rows each, in the rows' order, beside the .arrow file `path`; in flat memory."""
        values = ((0, size, count), (size, 0, count), (0, 1, count * size))  # first, step, how many
        for file, (first, step, length) in zip(_cluster_files(Path(path)), values):
            with open(file, "wb") as handle:
                _npy_header(handle, "<i8", length)
                for begin in range(0, length, _CHUNK):
                    number = np.arange(begin, min(begin + _CHUNK, length), dtype="<i8")
                    handle.write((first + step * number).data)


def _npy_header(handle: BinaryIO, descr: str, length: int) -> None:
    header = {"descr": descr, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(handle, header)


def _cluster_files(path: Path) -> list[Path]:
    return [path.with_name(f"{path.stem}.clusters.{part}.npy") for part in ("start", "count", "order")]


class Store:
    """One split, opened.

    lengths: (N,) int32, letters a record, or codes where there is a column `tokens` (has_tokens); clusters: Clusters
    or None; fingerprint: hex SHA-256 of the .arrow file; alphabet: "protein" or "molecule".
    """

    @classmethod
    def open(cls, path: str | Path, cache_dir: str | Path | None = None, verify: bool = False) -> Store:
        """path: the .arrow file; cache_dir: where index and stamp are instead of beside it, e.g. for read-only data.

        Raises: ValueError where there is no such file, its content is not the manifest's, it is not a file of ours,
        or its index cannot be written.
        """
        return cls(Path(path), None if cache_dir is None else Path(cache_dir), verify)

    def __init__(self, path: Path, cache_dir: Path | None, verify: bool) -> None:
        if not path.is_file():
            there = sorted(p.name for p in path.parent.glob("*.arrow")) if path.parent.is_dir() else []
            raise ValueError(f"{path} does not exist: {path.parent} has {', '.join(there) or 'no .arrow files'}")
        self.path = path
        trust = _Trust(path, cache_dir)
        self.fingerprint = trust.sha256(path, verify)
        source = pa.memory_map(str(path))
        whole = source.read_buffer(source.size())
        self._view = memoryview(whole)
        try:
            reader = pa.ipc.open_file(source)
            self._batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a whole, uncompressed Arrow file ({error}): prepare it again") from error
        columns = reader.schema
        if columns.names[:2] != ["id", "sequence"] or any(columns.field(i).type != pa.string() for i in (0, 1)):
            raise ValueError(f"{path}: expected string columns id, sequence, found {columns.names}: prepare it again")
        self.has_tokens = "tokens" in columns.names
        if self.has_tokens and (columns.names[2:] != ["tokens"] or columns.field(2).type != pa.binary()):
            raise ValueError(f"{path}: expected a third column tokens, binary, found {columns}: prepare it again")
        if any(batch.column(i).null_count for batch in self._batches for i in range(len(columns))):
            raise ValueError(f"{path} has empty (null) cells: prepare it again")
        self.alphabet = (columns.metadata or {}).get(b"moltron.alphabet", b"protein").decode()
        self._first = np.cumsum([0, *(batch.num_rows for batch in self._batches)])  # row of each batch, and their end
        self._starts, self.lengths = self._open_index(cache_dir or path.parent, trust, whole.address)
        self.clusters = None
        files = _cluster_files(path)
        if files[0].name in trust.expected or any(file.is_file() for file in files):
            for file in files:
                trust.sha256(file, verify)
            self.clusters = Clusters(*(np.load(file, mmap_mode="r") for file in files))
        trust.save()

    def __len__(self) -> int:
        return int(self._first[-1])

    def ids(self, rows: Iterable[int]) -> list[str]:
        return self._cells(0, rows)

    def texts(self, rows: Iterable[int]) -> list[str]:
        """Column `sequence`, as it was prepared."""
        return self._cells(1, rows)

    def _cells(self, column: int, rows: Iterable[int]) -> list[str]:
        rows = np.asarray(rows, dtype=np.int64)
        self._check_rows(rows)
        batch = np.searchsorted(self._first, rows, side="right") - 1
        places = zip(batch, (rows - self._first[batch]).tolist())
        return [self._batches[b].column(column)[row].as_py() for b, row in places]

    def gather(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Letters, or codes, `starts[i] … starts[i] + lengths[i]` of record `rows[i]`, one after the other
        -> (Σ lengths,) uint8.

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

    def _check_rows(self, rows: np.ndarray) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"{self.path} has rows 0 … {len(self) - 1}, not {rows.min()} … {rows.max()}")

    def _open_index(self, home: Path, trust: _Trust, base: int) -> tuple[np.ndarray, np.ndarray]:
        """-> starts (N,) int64, bytes from the file's beginning, and lengths (N,) int32; built where there is none."""
        files = [home / f"{self.path.stem}.{self.fingerprint[:16]}.{part}.npy" for part in ("starts", "lengths")]
        index = self._load_index(files)
        if index is None or not (all(map(trust.knows, files)) or self._is_right(index, base)):
            try:
                self._build_index(files, base)
            except OSError as error:
                problem = f"it cannot be written ({home}: {error.strerror})"
                raise ValueError(
                    f"{self.path} needs an index and {problem}: set data.cache_dir in training, cache_dir of "
                    "`moltron evaluate`, or copy the data"
                ) from error
            index = self._load_index(files)
            assert index is not None
        for file in files:
            trust.note(file)
        return index

    def _load_index(self, files: list[Path]) -> tuple[np.ndarray, np.ndarray] | None:
        try:  # a memory map cannot be empty
            starts, lengths = (np.load(file, mmap_mode="r" if len(self) else None) for file in files)
        except (OSError, ValueError):
            return None
        return (starts, lengths) if starts.shape == lengths.shape == (len(self),) else None

    def _spans(self, base: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each record batch: where its sequences, or tokens, start in the file (int64), their lengths (int32)."""
        for batch in self._batches:
            _, offsets, letters = batch.column(2 if self.has_tokens else 1).buffers()
            place = np.frombuffer(offsets, np.int32, batch.num_rows + 1) if batch.num_rows else np.zeros(1, np.int32)
            address = letters.address if letters is not None and letters.size else base
            if not base <= address <= base + len(self._view):
                raise ValueError(f"{self.path} is compressed: prepare it again, or write it without compression")
            yield place[:-1] + np.int64(address - base), np.diff(place)

    def _is_right(self, index: tuple[np.ndarray, np.ndarray], base: int) -> bool:
        return all(
            np.array_equal(stored[first : first + len(found)], found)
            for first, spans in zip(self._first, self._spans(base))
            for stored, found in zip(index, spans)
        )

    def _build_index(self, files: list[Path], base: int) -> None:
        files[0].parent.mkdir(parents=True, exist_ok=True)
        for part, (file, kind) in enumerate(zip(files, ("<i8", "<i4"))):
            with staged_file(file) as partial, open(partial, "wb") as handle:
                _npy_header(handle, kind, len(self))
                for spans in self._spans(base):
                    handle.write(spans[part].astype(kind, copy=False).data)


class _Trust:
    """Says what a file's hash is, hashing only where no stamp knows the file as it now is."""

    def __init__(self, path: Path, cache_dir: Path | None) -> None:
        manifest = path.parent / MANIFEST
        splits = read_json(manifest).get("splits", {}) if manifest.is_file() else {}
        files = splits.get(path.stem, {}).get("files", {})
        self.expected = {name: entry["sha256"] for name, entry in files.items()}
        self._stamp = path.with_name(f"{path.stem}.stamp.json")
        if cache_dir:  # may serve many stores: the stamp's name holds the store's place
            place = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=8).hexdigest()
            self._stamp = cache_dir / f"{path.stem}.{place}.stamp.json"
        try:
            self._known = read_json(self._stamp)  # {file name: [bytes, time of change, SHA-256]}
        except (OSError, ValueError):
            self._known = {}  # without a stamp, or with a damaged one, all is hashed
        self._before = dict(self._known)

    def knows(self, file: Path) -> bool:
        return self._known.get(file.name, [])[:2] == _state(file)

    def note(self, file: Path, sha256: str | None = None) -> None:
        self._known[file.name] = [*_state(file), sha256]

    def sha256(self, file: Path, verify: bool) -> str:
        if not file.is_file():
            raise ValueError(f"{file} is missing, {file.parent / MANIFEST} names it: copy or prepare it again")
        found = self._known[file.name][2] if self.knows(file) and not verify else None
        expected = self.expected.get(file.name, found)
        if found is None or found != expected:
            found = sha256_file(file)
        if expected not in (None, found):
            raise ValueError(
                f"{file} is not what {file.parent / MANIFEST} describes (SHA-256 {found[:16]}… instead of "
                f"{expected[:16]}…): it was changed or damaged after it was prepared; copy or prepare it again"
            )
        self.note(file, found)
        return found

    def save(self) -> None:
        if self._known != self._before:
            with suppress(OSError):  # read-only: every opening hashes again
                self._stamp.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._stamp, self._known)


def _state(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]
