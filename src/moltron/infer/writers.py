"""Files of results: Parquet shards first, one per block of records, then the file that was asked for.

    Block ──write_shard──> <output>.shards/00000.parquet … ──write_output──> .parquet .npz .safetensors .h5 .pkl
            temporary name, fsync, rename; footer: settings        row group by row group, memory flat (but .pkl)

What every format holds: ids in input order; `embeddings` (N, D); `hiddens` (L, D) and `logits` (L, V) of each record;
with several layers the name carries the layer: `embeddings_0`, `embeddings_6`; the settings as JSON.

    .npz           ids (N,) str, embeddings (N, D), hiddens (ΣL, D), logits (ΣL, V), offsets (N+1,), settings () str
    .safetensors   the same; ids (N, W) uint8, UTF-8 filled with zeros: `ids.numpy().view(f"S{W}").ravel()`; settings in
                   the header's metadata
    .h5            /ids, /embeddings, /sequences/<id>/hiddens with attribute original_id; settings as attribute of /
    .parquet       id, embeddings: fixed-size list, hiddens: list of fixed-size lists; settings in the schema
    .pkl           BioNeMo v1's list of dicts: sequence, id, embeddings, hiddens. Needs the whole result in memory.

Record i's rows of a ragged output are offsets[i] … offsets[i+1]. Knows nothing of models and inputs.

N records, D width, L residues, V vocabulary
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moltron.common.manifest import fsync

GROUP_BYTES = 32 << 20  # of one row group: what assembling holds in memory
FORMATS = (".parquet", ".npz", ".safetensors", ".h5", ".hdf5", ".pkl")
SETTINGS = b"moltron"  # key of the settings in a schema's metadata


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


@dataclass
class Block:
    """Results of consecutive records. values: (N, width) a column, or a list of (L, width) where it is ragged."""

    ids: list[str]
    sequences: list[str]
    values: dict[str, Any]


def _schema(columns: Iterable[Column], settings: dict[str, Any]) -> pa.Schema:
    fields = [("id", pa.string()), ("sequence", pa.string()), ("length", pa.int32())]
    fields += [(c.name, c.arrow_type()) for c in columns]
    return pa.schema(fields, metadata={SETTINGS: json.dumps(settings, sort_keys=True)})


def _replace(temporary: Path, path: Path) -> None:
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


# ---------------------------------------------------------------------------------------------------------- shards


def write_shard(path: Path, block: Block, columns: list[Column], settings: dict[str, Any]) -> None:
    """Write a block so that it is whole or not there. settings: what `is_done` compares."""
    ragged = next((block.values[c.name] for c in columns if c.ragged), None)
    lengths = np.array([len(x) for x in (block.sequences if ragged is None else ragged)], dtype=np.int32)
    per_row = 64 + sum(c.width * np.dtype(c.dtype).itemsize * (lengths if c.ragged else 1) for c in columns)
    groups = np.cumsum(np.broadcast_to(per_row, lengths.shape)) // GROUP_BYTES
    bounds = [*np.flatnonzero(np.diff(groups, prepend=-1)).tolist(), len(lengths)]
    schema = _schema(columns, settings)
    temporary = path.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=False, write_statistics=False) as out:
        for a, b in pairwise(bounds):
            arrays = [pa.array(block.ids[a:b]), pa.array(block.sequences[a:b]), pa.array(lengths[a:b])]
            arrays += [_to_arrow(c, block.values[c.name][a:b]) for c in columns]
            out.write_table(pa.Table.from_arrays(arrays, schema=schema), row_group_size=max(1, b - a))
        totals = {"rows": len(lengths), "residues": int(lengths.sum()), "id_width": _id_widths(block.ids)}
        out.add_key_value_metadata({"totals": json.dumps(totals)})
    _replace(temporary, path)


def _id_widths(ids: list[str]) -> list[int]:
    """Longest id in characters and in bytes."""
    return [max(map(len, ids), default=1), max((len(x.encode()) for x in ids), default=1)]


def _to_arrow(column: Column, values: Any) -> pa.Array:
    if not column.ragged:
        return pa.FixedSizeListArray.from_arrays(_flat(values, column.dtype), column.width)
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(x) for x in values], out=offsets[1:])
    rows = pa.FixedSizeListArray.from_arrays(_flat(np.concatenate(values), column.dtype), column.width)
    return pa.ListArray.from_arrays(offsets, rows)


def _flat(values: np.ndarray, dtype: str) -> pa.Array:
    return pa.array(np.ascontiguousarray(values, dtype=dtype).reshape(-1))


def _to_numpy(column: Column, array: pa.Array) -> np.ndarray:
    """All rows of a column end to end, (rows, width)."""
    rows = array.flatten() if column.ragged else array
    return rows.flatten().to_numpy(zero_copy_only=False).reshape(-1, column.width)


def is_done(path: Path, settings: dict[str, Any]) -> bool:
    """Whether a shard is there and was made of these records with these settings."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):
        return False
    return metadata.get(SETTINGS) == json.dumps(settings, sort_keys=True).encode()


class Rows:
    """Finished shards as one table, read row group by row group."""

    def __init__(self, paths: list[Path], columns: list[Column], settings: dict[str, Any]):
        self.paths, self.columns, self.settings = paths, columns, settings
        totals = [json.loads(pq.read_metadata(path).metadata[b"totals"]) for path in paths]
        self.count = sum(t["rows"] for t in totals)
        self.residues = sum(t["residues"] for t in totals)
        self.id_width = [max((t["id_width"][i] for t in totals), default=1) for i in (0, 1)]

    def tables(self, names: list[str]) -> Iterator[pa.Table]:
        for path in self.paths:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group, columns=names)

    def ids(self) -> Iterator[list[str]]:
        return (table["id"].to_pylist() for table in self.tables(["id"]))

    def values(self, column: Column) -> Iterator[np.ndarray]:
        return (_to_numpy(column, table[column.name].combine_chunks()) for table in self.tables([column.name]))

    def offsets(self) -> Iterator[np.ndarray]:
        yield np.zeros(1, dtype=np.int64)
        total = 0
        for table in self.tables(["length"]):
            ends = total + np.cumsum(table["length"].to_numpy(), dtype=np.int64)
            total = int(ends[-1])
            yield ends


# ----------------------------------------------------------------------------------------------------- final files


def write_output(rows: Rows, temporary: Path, path: Path) -> None:
    """Write the file asked for, in the format of its suffix; it takes its name when it is whole."""
    writers: dict[str, Callable[[Rows, Path], None]] = {
        ".parquet": _write_parquet,
        ".npz": _write_npz,
        ".safetensors": _write_safetensors,
        ".h5": _write_hdf5,
        ".hdf5": _write_hdf5,
        ".pkl": _write_pickle,
    }
    writers[path.suffix](rows, temporary)
    _replace(temporary, path)


def _write_parquet(rows: Rows, path: Path) -> None:
    schema = _schema(rows.columns, rows.settings)
    names = ["id", *(c.name for c in rows.columns)]
    schema = pa.schema([schema.field(name) for name in names], metadata=schema.metadata)
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, write_statistics=False) as out:
        for table in rows.tables(names):
            out.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=max(1, table.num_rows))


@dataclass
class _Stream:
    """An array of known shape that arrives in chunks along its first dimension."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[np.ndarray]]

    def write(self, file: IO[bytes]) -> None:
        for chunk in self.chunks():
            file.write(np.ascontiguousarray(chunk, dtype=self.dtype).reshape(-1).view(np.uint8).data)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def _value_streams(rows: Rows) -> list[_Stream]:
    streams = []
    for column in rows.columns:
        shape = (rows.residues if column.ragged else rows.count, column.width)
        streams.append(_Stream(column.name, np.dtype(column.dtype), shape, lambda column=column: rows.values(column)))
    if any(column.ragged for column in rows.columns):
        streams.append(_Stream("offsets", np.dtype(np.int64), (rows.count + 1,), rows.offsets))
    return streams


def _write_npz(rows: Rows, path: Path) -> None:
    text = np.dtype(f"<U{max(1, rows.id_width[0])}")
    settings = np.array(json.dumps(rows.settings, sort_keys=True))
    streams = [
        _Stream("ids", text, (rows.count,), lambda: (np.array(ids, dtype=text) for ids in rows.ids())),
        *_value_streams(rows),
        _Stream("settings", settings.dtype, (), lambda: iter([settings])),
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for stream in streams:
            entry = zipfile.ZipInfo(f"{stream.name}.npy")  # dated 1980: equal results, equal bytes
            with archive.open(entry, "w", force_zip64=True) as file:
                header = {"descr": stream.dtype.str, "fortran_order": False, "shape": stream.shape}
                np.lib.format.write_array_header_1_0(file, header)
                stream.write(file)  # pyright: ignore[reportArgumentType]


def _write_safetensors(rows: Rows, path: Path) -> None:
    """Header length, JSON header, data: written by hand, since the library wants all tensors in memory."""
    width = max(1, rows.id_width[1])

    def ids() -> Iterator[np.ndarray]:
        for chunk in rows.ids():
            yield np.array([x.encode() for x in chunk], dtype=f"S{width}").view(np.uint8)

    streams = [*_value_streams(rows), _Stream("ids", np.dtype(np.uint8), (rows.count, width), ids)]
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
    streams.sort(key=lambda stream: (-stream.dtype.itemsize, stream.name))  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"moltron": json.dumps(rows.settings, sort_keys=True)}}
    at = 0
    for stream in streams:
        data_offsets = [at, at + stream.nbytes]
        header[stream.name] = {"dtype": names[stream.dtype.name], "shape": stream.shape, "data_offsets": data_offsets}
        at += stream.nbytes
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
    with h5py.File(path, "w") as file:
        file.attrs["moltron"] = json.dumps(rows.settings, sort_keys=True)
        ids = file.create_dataset("ids", (rows.count,), dtype=h5py.string_dtype())
        at = 0
        for chunk in rows.ids():
            ids[at : at + len(chunk)] = chunk
            at += len(chunk)
        for column in (c for c in rows.columns if not c.ragged):
            data = file.create_dataset(column.name, (rows.count, column.width), dtype=column.dtype)
            at = 0
            for chunk in rows.values(column):
                data[at : at + len(chunk)] = chunk
                at += len(chunk)
        ragged = [c for c in rows.columns if c.ragged]
        if ragged:
            _write_groups(rows, ragged, file.create_group("sequences"))


def _write_groups(rows: Rows, ragged: list[Column], parent: h5py.Group) -> None:
    copies: Counter[str] = Counter()
    for table in rows.tables(["id", "length", *(c.name for c in ragged)]):
        values = {c.name: _to_numpy(c, table[c.name].combine_chunks()) for c in ragged}
        ends = np.cumsum(table["length"].to_numpy(), dtype=np.int64).tolist()
        for record_id, begin, end in zip(table["id"].to_pylist(), [0, *ends], ends, strict=False):
            name = escaped = group_name(record_id)
            while name in parent:  # the same id again
                copies[escaped] += 1
                name = f"{escaped}#{copies[escaped] + 1}"
            group = parent.create_group(name)
            group.attrs["original_id"] = record_id
            for key, rows_of_key in values.items():
                group.create_dataset(key, data=rows_of_key[begin:end])


def _write_pickle(rows: Rows, path: Path) -> None:
    """BioNeMo v1's list of dicts (spec tasks_and_inference.md §5)."""
    records: list[dict[str, Any]] = []
    for table in rows.tables(["sequence", "id", "length", *(c.name for c in rows.columns)]):
        values = {c: _to_numpy(c, table[c.name].combine_chunks()) for c in rows.columns}
        ends = np.cumsum(table["length"].to_numpy(), dtype=np.int64).tolist()
        texts = zip(table["sequence"].to_pylist(), table["id"].to_pylist(), [0, *ends], ends, strict=False)
        for i, (sequence, record_id, begin, end) in enumerate(texts):
            record: dict[str, Any] = {"sequence": sequence, "id": record_id}
            for column, of_group in values.items():
                record[column.name] = (of_group[begin:end] if column.ragged else of_group[i]).copy()
            records.append(record)
    with open(path, "wb") as file:
        pickle.dump(records, file, protocol=4)
