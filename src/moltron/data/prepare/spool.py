"""Pass 1: every record of every input, cleaned, into one temporary Arrow file; in memory only keys, 17 bytes a record.

    Source ──Record──> clean | molecules.canonicalize ──> spool.arrow (id, sequence, line)
           ──Reject──────────────────────────────> rejects.tsv

Knows nothing of splits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from moltron.common.logging import Progress
from moltron.config.schema import PrepareConfig
from moltron.data.prepare.keys import key
from moltron.data.prepare.molecules import CHUNK, LONGEST, Workers, canonicalize
from moltron.data.readers import Record, Reject, Source, check_alphabet, reject_table
from moltron.tokenizers import clean, get_tokenizer

_SCHEMA = pa.schema([("id", pa.string()), ("sequence", pa.string()), ("line", pa.int64())])
_BATCH_ROWS, _BATCH_LETTERS = 1 << 16, 8 << 20  # a record batch is full with either
Prepared = tuple[Record | Reject, bytes, int, str | None]  # as read; sequence, length, problem
Item = TypeVar("Item")


class Rejects:
    """rejects.tsv, and how many there are of each reason."""

    def __init__(self, path: Path) -> None:
        self.counts: Counter[str] = Counter()
        file = open(path, "w", encoding="utf-8", errors="replace", newline="")  # noqa: SIM115
        self.close = file.close
        self._table = reject_table(file)

    def add(self, source: str, line: int, id: str, reason: str) -> None:
        self.counts[reason] += 1
        self._table.writerow([source, line, id, reason])


class Spool:
    """Rows 0 … N-1 in the order read. `role` says which input a row came from; see splits."""

    def __init__(
        self, path: Path, config: PrepareConfig, rejects: Rejects, progress: Progress, workers: Workers
    ) -> None:
        self.sources: list[dict[str, Any]] = []  # for the manifest
        self.cleaning: Counter[str] = Counter()
        self.kind = config.kind
        self.num_read = 0  # rejects included
        self._config, self._rejects, self._progress, self._path = config, rejects, progress, path
        self._workers = workers
        self._file = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._file, _SCHEMA)
        self._batches: list[tuple[int, str]] = []  # rows and source of each record batch
        self._ids, self._sequences, self._roles = bytearray(), bytearray(), bytearray()

    def read(self, files: list[str], role: int) -> None:
        """Raises: ValueError, see readers."""
        for file in files:
            with Source(file, self._config.id_column, self._config.sequence_column) as source:
                kind = source.kind or "protein"
                self.kind = self.kind or kind
                if self._config.kind is None and kind != self.kind:
                    raise ValueError(f"{file} looks like kind={kind}, the input before it like {self.kind}: set kind")
                _check_kind(self._config, self.kind)
                self._read(source, role)
                self.sources.append(source.describe())

    def _read(self, source: Source, role: int) -> None:
        config, rejects = self._config, self._rejects
        molecules = self.kind == "molecule"
        longest = config.max_length or (LONGEST if molecules else 1 << 31)
        ids, sequences, lines, letters = [], [], [], 0
        for item, sequence, length, problem in (self._molecules if molecules else self._proteins)(source):
            self.num_read += 1
            if problem is None and length < config.min_length:
                problem = f"shorter than min_length={config.min_length}"
            elif problem is None and length > longest:
                problem = f"longer than max_length={longest}"
            if problem is not None:
                rejects.add(item.source, item.line, item.id, problem)
                continue
            ids.append(item.id)
            sequences.append(sequence)
            lines.append(item.line)
            self._ids += key(item.id.encode())
            self._sequences += key(sequence)
            letters += len(sequence)
            if letters >= _BATCH_LETTERS or len(ids) >= _BATCH_ROWS:
                self._flush([ids, sequences, lines], source, role)
                ids, sequences, lines, letters = [], [], [], 0
        self._flush([ids, sequences, lines], source, role)

    def _proteins(self, source: Source) -> Iterator[Prepared]:
        for item in check_alphabet(source.records(), get_tokenizer("esm2")):
            if isinstance(item, Reject):
                yield item, b"", 0, item.reason
            else:
                sequence, problem = self._clean(item.sequence)
                yield item, sequence, len(sequence), problem

    def _molecules(self, source: Source) -> Iterator[Prepared]:
        chunks = batched(source.records(), CHUNK)
        tasks = ((chunk, [item.sequence for item in chunk if isinstance(item, Record)]) for chunk in chunks)
        for chunk, results in self._workers.map(canonicalize, tasks, self._config):
            self._show(source)
            found = iter(results)
            for item in chunk:
                if isinstance(item, Reject):
                    yield item, b"", 0, item.reason
                    continue
                molecule = next(found)
                if molecule.changes:
                    self.cleaning.update(molecule.changes)
                    self.cleaning["records"] += 1
                yield item, molecule.smiles, molecule.length, molecule.problem

    def _clean(self, sequence: bytes) -> tuple[bytes, str | None]:
        cleaned, changes = clean(sequence)
        if changes:
            if changes["unknown"] and self._config.illegal == "reject":
                return cleaned, "letters that are no residues"
            self.cleaning.update(changes)
            self.cleaning["records"] += 1
        return cleaned, None if cleaned else "no residues"

    def _flush(self, columns: list[list[Any]], source: Source, role: int) -> None:
        self._show(source)
        rows = len(columns[0])
        if rows:
            self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            self._batches.append((rows, source.path))
            self._roles += bytes([role]) * rows

    def _show(self, source: Source) -> None:
        before = sum(entry["bytes"] for entry in self.sources)
        self._progress.update((before + source.bytes_read) >> 10)

    def close(self) -> None:
        self._writer.close()
        self._file.close()  # the writer leaves it open
        self.id_keys = np.frombuffer(self._ids, dtype=np.uint64)  # (N,)
        self.sequence_keys = np.frombuffer(self._sequences, dtype=np.uint64)  # (N,)
        self.role = np.frombuffer(self._roles, dtype=np.uint8)  # (N,)

    def __len__(self) -> int:
        return len(self._roles)

    def batches(self) -> Iterator[tuple[slice, str, pa.RecordBatch]]:
        """What was written, in order: rows, file they came from, columns. Read, not mapped: memory stays flat."""
        first = 0
        with pa.OSFile(str(self._path)) as file:
            reader = pa.ipc.open_file(file)
            for index, (rows, source) in enumerate(self._batches):
                yield slice(first, first + rows), source, reader.get_batch(index)
                first += rows


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch


def _check_kind(config: PrepareConfig, kind: str | None) -> None:
    """Raises: ValueError for settings that the other kind has."""
    if kind == "molecule" and config.variants and (config.clusters or config.mapping):
        raise ValueError("a molecule's variants are a cluster: with clusters or mapping set variants=0")
    only = {"salts": "keep", "max_weight": None, "max_logp": None}
    wrong = [f"{name}={getattr(config, name)}" for name, default in only.items() if getattr(config, name) != default]
    if kind != "molecule" and wrong:
        raise ValueError(f"{', '.join(wrong)}: for molecules, and the input looks like kind={kind}: set kind=molecule")
