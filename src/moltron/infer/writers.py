"""Files of results: Parquet shards first, one per some thousand records, then the file that was asked for.

    records ──write_shard──> <output>.shards/00000.parquet … ──write_output──> .parquet .npz .safetensors .h5 .pkl
              temporary name, fsync, rename; footer: settings        row group by row group, memory flat (but .pkl)

What the formats hold is in docs/embedding.md, section Files. Knows nothing of models and inputs.

N records, D width, L residues, V vocabulary
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moltron.common.manifest import fsync

GROUP_BYTES = 32 << 20  # of one row group, on average: what assembling holds in memory


@dataclass(frozen=True)
class Column:
    """One output. ragged: (L, width) a record, else (width,)."""

    name: str
    width: int
    ragged: bool
    dtype: str = "float32"

    def arrow_type(self) -> pa.DataType:
        row = pa.list_(pa.from_numpy_dtype(np.dtype(self.dtype)), self.width)
        return pa.list_(row) if self.ragged else row

    def to_arrow(self, values: Any) -> pa.Array:
        """values: of some records, see `write_shard`."""
        rows = np.concatenate(values) if self.ragged else values
        lists = pa.FixedSizeListArray.from_arrays(pa.array(rows.astype(self.dtype, copy=False).ravel()), self.width)
        if not self.ragged:
            return lists
        return pa.ListArray.from_arrays(np.cumsum([0, *map(len, values)], dtype=np.int32), lists)

    def to_numpy(self, table: pa.Table) -> np.ndarray:
        """All rows of this column end to end, (rows, width)."""
        array = table[self.name].combine_chunks()
        lists = array.flatten() if self.ragged else array
        return lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, self.width)


def _schema(texts: dict[str, pa.DataType], columns: list[Column], settings: str) -> pa.Schema:
    return pa.schema(texts | {c.name: c.arrow_type() for c in columns}, metadata={b"moltron": settings})


def _json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _replace(temporary: Path, path: Path) -> None:
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


# ---------------------------------------------------------------------------------------------------------- shards


def write_shard(path: Path, records: dict[str, Any], columns: list[Column], settings: dict[str, Any]) -> None:
    """Write results of consecutive records so that they are whole or not there. settings: what `is_done` compares.

    records: lists `id` and `sequence`; a column's (N, width), or its list of (L, width) where it is ragged.
    """
    count = len(records["id"])
    ragged = [column.name for column in columns if column.ragged]
    records = {**records, "length": [len(x) for x in records[ragged[0] if ragged else "sequence"]]}
    size = sum(row.nbytes for column in columns for row in records[column.name])
    step = max(1, count * GROUP_BYTES // size)
    texts = {"id": pa.string(), "sequence": pa.string(), "length": pa.int32()}
    schema = _schema(texts, columns, _json(settings))
    temporary = path.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=False, write_statistics=False) as out:
        for begin in range(0, count, step):
            rows = slice(begin, begin + step)
            arrays = [pa.array(records[name][rows], kind) for name, kind in texts.items()]
            arrays += [column.to_arrow(records[column.name][rows]) for column in columns]
            out.write_batch(pa.record_batch(arrays, schema=schema), row_group_size=step)
    _replace(temporary, path)


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a shard is there and was made of these records with these settings."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return metadata.get(b"moltron") == _json(settings).encode()


class _Stream(NamedTuple):
    """An array of known shape that arrives in chunks along its first dimension."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Iterable[np.ndarray]

    def write(self, file: Any) -> None:
        for chunk in self.chunks:
            file.write(chunk.astype(self.dtype, copy=False).tobytes())


class Rows:
    """Finished shards as one table, read row group by row group. residues: ΣL; id_width: longest, characters, bytes."""

    def __init__(self, paths: list[Path], columns: list[Column], settings: dict[str, Any]):
        self.paths, self.columns, self.settings = paths, columns, _json(settings)
        self.count, self.residues, self.id_width = 0, 0, [1, 1]
        for table in self.tables("id", "length"):
            ids = table["id"].to_pylist()
            self.count += len(ids)
            self.residues += int(table["length"].to_numpy().sum())
            self.id_width = np.maximum(self.id_width, [(len(x), len(x.encode())) for x in ids]).max(axis=0).tolist()

    def tables(self, *names: str) -> Iterator[pa.Table]:
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=names)

    def records(self, columns: list[Column]) -> Iterator[dict[str, Any]]:
        """sequence, id and the columns' (width,) or (L, width), record by record."""
        for table in self.tables("sequence", "id", "length", *(c.name for c in columns)):
            splits = np.cumsum(table["length"].to_numpy())[:-1]
            fields = {name: table[name].to_pylist() for name in ("sequence", "id")}
            for column in columns:
                rows = column.to_numpy(table)
                fields[column.name] = np.split(rows, splits) if column.ragged else list(rows)
            for values in zip(*fields.values(), strict=True):
                yield dict(zip(fields, values, strict=True))

    def streams(self) -> list[_Stream]:
        """All of it as arrays: ids (N,), one a column and, where one is ragged, offsets (N+1,) of the records' rows."""
        text = np.dtype(f"<U{self.id_width[0]}")
        ids = (np.array(table["id"].to_pylist(), dtype=text) for table in self.tables("id"))
        streams = [_Stream("ids", text, (self.count,), ids)]
        for c in self.columns:
            shape = (self.residues if c.ragged else self.count, c.width)
            streams.append(_Stream(c.name, np.dtype(c.dtype), shape, map(c.to_numpy, self.tables(c.name))))
        if any(column.ragged for column in self.columns):
            streams.append(_Stream("offsets", np.dtype(np.int64), (self.count + 1,), self._offsets()))
        return streams

    def _offsets(self) -> Iterator[np.ndarray]:
        total = np.zeros(1, dtype=np.int64)
        yield total
        for table in self.tables("length"):
            ends = total + np.cumsum(table["length"].to_numpy(), dtype=np.int64)
            total = ends[-1:]
            yield ends


# ----------------------------------------------------------------------------------------------------- final files


def write_output(rows: Rows, temporary: Path, path: Path) -> None:
    """Write the file asked for, in the format of its suffix; it takes its name when it is whole."""
    FORMATS[path.suffix](rows, temporary)
    _replace(temporary, path)


def _write_parquet(rows: Rows, path: Path) -> None:
    schema = _schema({"id": pa.string()}, rows.columns, rows.settings)
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, write_statistics=False) as out:
        for table in rows.tables(*schema.names):
            out.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=table.num_rows)


def _write_npz(rows: Rows, path: Path) -> None:
    settings = np.array(rows.settings)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for stream in [*rows.streams(), _Stream("settings", settings.dtype, (), [settings])]:
            entry = zipfile.ZipInfo(f"{stream.name}.npy")  # dated 1980: equal results, equal bytes
            with archive.open(entry, "w", force_zip64=True) as file:
                header = {"descr": stream.dtype.str, "fortran_order": False, "shape": stream.shape}
                np.lib.format.write_array_header_1_0(file, header)
                stream.write(file)


def _write_safetensors(rows: Rows, path: Path) -> None:
    """Header length, JSON header, data: written by hand, since the library wants all tensors in memory."""
    width = rows.id_width[1]
    ids, *streams = rows.streams()
    encoded = (np.char.encode(chunk, "utf-8").astype(f"S{width}").view(np.uint8) for chunk in ids.chunks)
    streams.append(_Stream("ids", np.dtype(np.uint8), (rows.count, width), encoded))
    streams.sort(key=lambda stream: (-stream.dtype.itemsize, stream.name))  # keeps every tensor aligned
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
    header: dict[str, Any] = {"__metadata__": {"moltron": rows.settings}}
    end = 0
    for name, dtype, shape, _ in streams:
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for stream in streams:
            stream.write(file)


def group_name(record_id: str) -> str:
    """An id as the name of one HDF5 group: `/`, `%` and NUL as %XX, and the names that HDF5 reads as a path."""
    if record_id in ("", ".", ".."):
        return "%" + record_id.replace(".", "%2E")
    return "".join(f"%{ord(c):02X}" if c in "/%\0" else c for c in record_id)


def _write_hdf5(rows: Rows, path: Path) -> None:
    ragged = [column for column in rows.columns if column.ragged]
    with h5py.File(path, "w") as file:
        file.attrs["moltron"] = rows.settings
        for name, dtype, shape, chunks in rows.streams():
            if name in [c.name for c in ragged] or name == "offsets":
                continue
            data = file.create_dataset(name, shape, h5py.string_dtype() if name == "ids" else dtype)
            at = 0
            for chunk in chunks:
                data[at : at + len(chunk)] = chunk.tolist() if name == "ids" else chunk
                at += len(chunk)
        if not ragged:
            return
        parent = file.create_group("sequences")
        copies: Counter[str] = Counter()
        for record in rows.records(ragged):
            name = escaped = group_name(record["id"])
            while name in parent:  # the same id again
                copies[escaped] += 1
                name = f"{escaped}#{copies[escaped] + 1}"
            group = parent.create_group(name)
            group.attrs["original_id"] = record["id"]
            for column in ragged:
                group.create_dataset(column.name, data=record[column.name])


def _write_pickle(rows: Rows, path: Path) -> None:
    """BioNeMo v1's list of dicts (spec tasks_and_inference.md §5)."""
    with open(path, "wb") as file:
        pickle.dump(list(rows.records(rows.columns)), file, protocol=4)


FORMATS = {
    ".parquet": _write_parquet,
    ".npz": _write_npz,
    ".safetensors": _write_safetensors,
    ".h5": _write_hdf5,
    ".hdf5": _write_hdf5,
    ".pkl": _write_pickle,
}
