"""Which record belongs to which cluster: from a table, from MMseqs2's output or from the UniRef50 -> 90 mapping.

    clusters.tsv ──chunks──> keys ──find──> rows ──> cluster key (and split) of each row
    mapping.tsv  ──chunks──> keys ──find──> rows ──> owner (a UniRef50 row) of each UniRef90 row

A table is read in chunks, so memory does not grow with it. Knows nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from moltron.data.prepare.keys import Lookup, keys_of
from moltron.data.prepare.spool import Rejects, Spool
from moltron.data.readers import Source

_CHUNK = 1 << 16
_PREFIXES = ("UniRef90_", "UniRef50_")
SPLITS = {"train": 0, "val": 1, "validation": 1, "test": 2}


@dataclass
class Assignment:
    keys: np.ndarray  # (N, 2) the cluster's key; in none: that of its own id
    split: np.ndarray | None  # (N,) int8, if the table has a column `split`
    num_alone: int  # rows in no cluster


def read_clusters(path: str, column: str | None, spool: Spool, rows: np.ndarray, rejects: Rejects) -> Assignment:
    """path: MMseqs2's two columns (representative, member), or a table with a header: `id`, `column`, maybe `split`.

    rows: those of the spool that may have a cluster, ascending. Ids that are not among them are passed over: one table
    may serve several inputs. Raises: ValueError for a table of another shape, or with none of the ids.
    """
    lookup = Lookup(spool.id_keys[rows], rows)
    keys = spool.id_keys.copy()
    known = np.zeros(len(keys), dtype=bool)
    with Source(path, plain=True) as source:
        table, where = _open_table(source, path, column)
        split = np.zeros(len(keys), dtype=np.int8) if len(where) == 3 else None
        while chunk := list(islice(table, _CHUNK)):
            short = next((line for line, row in chunk if len(row) <= max(where)), None)
            if short:
                raise ValueError(f"{path}, line {short}: fewer than {max(where) + 1} columns")
            found = lookup.find(keys_of(row[where[0]] for _, row in chunk))
            labels = keys_of(row[where[1]] for _, row in chunk)
            for at in np.flatnonzero(found >= 0):
                line, row = chunk[at]
                if known[found[at]]:
                    if (keys[found[at]] != labels[at]).any():
                        rejects.add(row[where[0]], "listed in a second cluster, stays in the first", path, line)
                    continue
                known[found[at]] = True
                keys[found[at]] = labels[at]
                if split is not None:
                    if row[where[2]] not in SPLITS:
                        raise ValueError(f"{path}, line {line}: split {row[where[2]]!r} is not train, val or test")
                    split[found[at]] = SPLITS[row[where[2]]]
        spool.sources.append(
            {"path": path, "bytes": source.bytes_read, "sha256": source.sha256, "records": source.line}
        )
    if not known.any():
        raise ValueError(f"{path} has none of the input's ids: is it the table of another input?")
    return Assignment(keys, split, len(rows) - int(known.sum()))


def _open_table(
    source: Source, path: str, column: str | None
) -> tuple[Iterator[tuple[int, list[str]]], tuple[int, ...]]:
    """-> rows, and the places of (id, cluster) or (id, cluster, split) in them."""
    first = next(source.lines(), "")
    rows = source.rows("\t" if "\t" in first else ",", lines=chain([first], source.lines()))
    _, header = next(rows, (0, []))
    if "id" not in header:
        if column:
            raise ValueError(f"{path}: cluster_column={column} needs a header line with a column `id`, found {header}")
        if len(header) != 2:
            raise ValueError(f"{path}: neither MMseqs2's two columns nor a header line with a column `id`: {header}")
        return chain([(1, header)], rows), (1, 0)
    if column not in header:
        asked = f"no column {column!r}" if column else "set cluster_column"
        raise ValueError(f"{path}: {asked}; it has the columns {', '.join(header)}")
    names = ["id", column, *(["split"] if "split" in header else [])]
    return rows, tuple(header.index(name) for name in names)


@dataclass
class Mapping:
    owner: np.ndarray  # (N,) int64: for a member's row the row of its cluster's UniRef50 record, else -1
    mapped: np.ndarray  # (N,) bool: UniRef50 rows that have a line
    num_absent: int  # clusters of the mapping whose UniRef50 record is not in the input: filtered out there


def read_mapping(path: str, spool: Spool, input_rows: np.ndarray, member_rows: np.ndarray, rejects: Rejects) -> Mapping:
    """Specification data.md §3: `UniRef50 id <TAB> id,id,…`, a header line or none.

    Ids match literally; where one is not found, a prefix UniRef90_ or UniRef50_ is removed on either side. A member
    that is not found, or is listed twice, goes to the rejects with its line.
    """
    clusters = _Finder(spool, input_rows)
    members = _Finder(spool, member_rows)
    owner = np.full(len(spool), -1)
    mapped = np.zeros(len(spool), dtype=bool)
    num_absent = 0
    with Source(path, plain=True) as source:
        rows = source.rows("\t", quoted=False)
        first = next(rows, (0, [""]))
        if clusters.find(first[1][:1], thorough=False)[0] >= 0:  # else it is the header
            rows = chain([first], rows)
        while chunk := list(islice(rows, _CHUNK)):
            heads = clusters.find([row[0] for _, row in chunk])
            lists = [row[1].split(",") if len(row) > 1 else [] for _, row in chunk]
            found = members.find([member.strip() for names in lists for member in names])
            place = 0
            for (line, _), head, names in zip(chunk, heads, lists):
                here = found[place : place + len(names)]
                place += len(names)
                if head < 0:
                    num_absent += 1
                    continue
                mapped[head] = True
                for name, member in zip(names, here):
                    if member < 0:
                        rejects.add(name.strip(), "member is not in the members file", path, line)
                    elif owner[member] >= 0:
                        rejects.add(name.strip(), "member is listed a second time", path, line)
                    else:
                        owner[member] = head
        spool.sources.append(
            {"path": path, "bytes": source.bytes_read, "sha256": source.sha256, "records": source.line}
        )
    if not mapped.any():
        raise ValueError(f"{path} has none of the input's ids in its first column: is it the mapping of another input?")
    return Mapping(owner, mapped, num_absent)


class _Finder:
    """Rows by id; what is not found literally is looked for without its prefix, then among ids without theirs."""

    def __init__(self, spool: Spool, rows: np.ndarray) -> None:
        self._spool = spool
        self._rows = rows
        self._literal = Lookup(spool.id_keys[rows], rows)
        self._bare: Lookup | None = None  # made when first needed: real files match literally

    def find(self, names: list[str], thorough: bool = True) -> np.ndarray:
        result = self._literal.find(keys_of(names))
        missing = np.flatnonzero(result < 0)
        if len(missing):
            bare = keys_of(_without_prefix(names[at]) for at in missing)
            result[missing] = self._literal.find(bare)
            still = result[missing] < 0
            if thorough and still.any():
                result[missing[still]] = self._without_prefixes().find(bare[still])
        return result

    def _without_prefixes(self) -> Lookup:
        if self._bare is None:
            batches = self._spool.batches()
            keys = [keys_of(map(_without_prefix, batch.column(0).to_pylist())) for _, _, batch in batches]
            self._bare = Lookup(np.concatenate(keys)[self._rows], self._rows)
        return self._bare


def _without_prefix(name: str) -> str:
    return next((name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix)), name)
