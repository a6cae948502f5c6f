"""Pass 1: every record of every input, cleaned, into one temporary Arrow file; in memory only keys, 33 bytes a record.

    Source ──Record──> clean | canonical SMILES ──> spool.arrow (id, sequence, line)
           ──Reject──────────────────────────────> rejects.tsv

Knows nothing of splits.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moltron.config.schema import PrepareConfig
from moltron.data.prepare.keys import as_array, key
from moltron.data.prepare.molecules import Canonicalizer
from moltron.data.readers import Reject, Source, expand_inputs
from moltron.data.store import BATCH_BYTES
from moltron.tokenizers.residues import clean

_SCHEMA = pa.schema([("id", pa.string()), ("sequence", pa.string()), ("line", pa.int64())])
_BATCH_ROWS = 1 << 16


class Rejects:
    """rejects.tsv: source, line, id, reason; and how many of each reason."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._file = open(path, "w", encoding="utf-8", errors="replace", newline="")  # noqa: SIM115
        self._table = csv.writer(self._file, delimiter="\t", lineterminator="\n")
        self._table.writerow(["source", "line", "id", "reason"])

    def add(self, id: str, reason: str, source: str, line: int) -> None:
        self.counts[reason] += 1
        self._table.writerow([source, line, id, reason])

    def close(self) -> None:
        self._file.close()


class Spool:
    """Rows 0 … N-1 in the order read. `role` says which input a row came from; see prepare.ROLES."""

    def __init__(self, path: Path, config: PrepareConfig, rejects: Rejects, progress: Callable[[int], None]) -> None:
        self.sources: list[dict[str, Any]] = []
        self.cleaning: Counter[str] = Counter()
        self.kind = config.kind
        self.num_read = 0  # rejects included
        self._config = config
        self._rejects = rejects
        self._progress = progress
        self._path = path
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._batches: list[tuple[int, int]] = []  # rows and source of each record batch
        self._ids = bytearray()
        self._sequences = bytearray()
        self._roles = bytearray()

    def read(self, path: str, role: int) -> None:
        """Adds all files that `path` names. Raises: ValueError, see readers."""
        for file in expand_inputs(path):
            with Source(file, self._config.id_column, self._config.sequence_column) as source:
                self.kind = self.kind or source.kind
                if self._config.kind is None and source.kind != self.kind:
                    raise ValueError(
                        f"{file} looks like kind={source.kind}, the input before it like {self.kind}: set kind"
                    )
                self._read(source, role)
                self.sources.append(
                    {"path": file, "bytes": source.bytes_read, "sha256": source.sha256, "records": source.num_records}
                )

    def _read(self, source: Source, role: int) -> None:
        config, rejects = self._config, self._rejects
        prepare = Canonicalizer() if self.kind == "molecule" else self._clean
        longest = config.max_length or 1 << 31
        ids, sequences, lines, letters = [], [], [], 0
        for item in source.records():
            self.num_read += 1
            if isinstance(item, Reject):
                rejects.add(*item)
                continue
            sequence, problem = prepare(item.sequence)
            if problem is None and len(sequence) < config.min_length:
                problem = f"shorter than min_length={config.min_length}"
            elif problem is None and len(sequence) > longest:
                problem = f"longer than max_length={config.max_length}"
            if problem is not None:
                rejects.add(item.id, problem, item.source, item.line)
                continue
            ids.append(item.id)
            sequences.append(sequence)
            lines.append(item.line)
            self._ids += key(item.id.encode())
            self._sequences += key(sequence)
            letters += len(sequence)
            if letters >= BATCH_BYTES or len(ids) >= _BATCH_ROWS:
                self._flush(ids, sequences, lines, source, role)
                ids, sequences, lines, letters = [], [], [], 0
        self._flush(ids, sequences, lines, source, role)

    def _clean(self, sequence: bytes) -> tuple[bytes, str | None]:
        cleaned, changes = clean(sequence)
        if changes:
            if changes["unknown"] and self._config.illegal == "reject":
                return cleaned, "letters that are no residues"
            self.cleaning.update(changes)
            self.cleaning["records"] += 1
        return cleaned, None if cleaned else "no residues"

    def _flush(self, ids: list[str], sequences: list[bytes], lines: list[int], source: Source, role: int) -> None:
        self._progress(source.bytes_read)
        if not ids:
            return
        columns = [pa.array(ids, pa.string()), pa.array(sequences, pa.string()), pa.array(lines, pa.int64())]
        self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._batches.append((len(ids), len(self.sources)))
        self._roles += bytes([role]) * len(ids)

    def close(self) -> None:
        self._writer.close()
        self._file.close()  # the writer leaves it open
        self.id_keys = as_array(self._ids)  # (N, 2)
        self.sequence_keys = as_array(self._sequences)  # (N, 2)
        self.role = np.frombuffer(self._roles, dtype=np.uint8)  # (N,)

    def __len__(self) -> int:
        return len(self._roles)

    def batches(self) -> Iterator[tuple[slice, str, pa.RecordBatch]]:
        """What was written, in order: rows, file they came from, columns. Read, not mapped: memory stays flat."""
        first = 0
        with pa.OSFile(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for index, (rows, source) in enumerate(self._batches):
                yield slice(first, first + rows), self.sources[source]["path"], reader.get_batch(index)
                first += rows

    def remove(self) -> None:
        self._path.unlink()
