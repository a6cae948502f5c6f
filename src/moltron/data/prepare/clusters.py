"""Which record belongs to which cluster: from a table, from MMseqs2's output or from the UniRef50 -> 90 mapping.

    clusters.tsv ──chunks──> keys ──find──> rows ──> cluster key (and split) of each row
    mapping.tsv  ──chunks──> keys ──find──> rows ──> owner (a UniRef50 row) of each UniRef90 row

A table is read in chunks, so memory does not grow with it. Knows nothing of sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice

import numpy as np

from moltron.data.prepare.keys import Lookup, keys_of
from moltron.data.prepare.spool import Rejects, Spool
from moltron.data.readers import Source

_CHUNK = 1 << 16
SPLITS = {"train": 0, "val": 1, "validation": 1, "test": 2}
Rows = Iterator[tuple[int, list[str]]]  # line, cells


@dataclass
class Assignment:
    keys: np.ndarray  # (N,) the cluster's key; in none: that of its own id
    split: np.ndarray | None  # (N,) uint8, if the table has a column `split`
    num_alone: int  # rows in no cluster
    num_absent: int  # lines of ids that are not in the input


def read_clusters(path: str, column: str | None, spool: Spool, rows: np.ndarray, rejects: Rejects) -> Assignment:
    """path: MMseqs2's two columns (representative, member), or a table with a header: `id`, `column`, maybe `split`.

    rows: those of the spool that may have a cluster, ascending. Ids that are not among them are passed over: one table
    may serve several inputs. Raises: ValueError for a table of another shape, or with none of the ids.
    """
    lookup = Lookup(spool.id_keys[rows], rows)
    keys = spool.id_keys.copy()
    split = np.zeros(len(keys), dtype=np.uint8)
    known = np.zeros(len(keys), dtype=bool)
    num_absent = 0
    with Source(path, plain=True) as source:
        table, id_at, cluster_at, split_at = _open_table(source, column)
        width = max(id_at, cluster_at, split_at) + 1
        while chunk := list(islice(table, _CHUNK)):
            for line, row in chunk:
                if len(row) < width:
                    raise ValueError(f"{path}, line {line}: fewer than {width} columns")
            found = lookup.find(keys_of(row[id_at] for _, row in chunk))
            num_absent += int((found < 0).sum())
            labels = keys_of(row[cluster_at] for _, row in chunk)
            for at in np.flatnonzero(found >= 0):
                (line, row), here = chunk[at], found[at]
                if known[here]:
                    if keys[here] != labels[at]:
                        rejects.add(path, line, row[id_at], "listed in a second cluster, stays in the first")
                    continue
                known[here], keys[here] = True, labels[at]
                if split_at >= 0:
                    if row[split_at] not in SPLITS:
                        raise ValueError(f"{path}, line {line}: split {row[split_at]!r} is not train, val or test")
                    split[here] = SPLITS[row[split_at]]
        spool.sources.append(source.describe(source.line))
    if not known.any():
        raise ValueError(f"{path} has none of the input's ids: is it the table of another input?")
    return Assignment(keys, split if split_at >= 0 else None, len(rows) - int(known.sum()), num_absent)


def _open_table(source: Source, column: str | None) -> tuple[Rows, int, int, int]:
    """-> rows, and the places of id, cluster and split (-1: it has none) in them."""
    path, rows = source.path, source.rows()
    _, header = next(rows, (0, []))
    if "id" not in header:
        if column:
            raise ValueError(f"{path}: cluster_column={column} needs a header line with a column `id`, found {header}")
        if len(header) != 2:
            raise ValueError(f"{path}: neither MMseqs2's two columns nor a header line with a column `id`: {header}")
        return chain([(1, header)], rows), 1, 0, -1
    if column not in header:
        asked = f"no column {column!r}" if column else "set cluster_column"
        raise ValueError(f"{path}: {asked}; it has the columns {', '.join(header)}")
    return rows, header.index("id"), header.index(column), header.index("split") if "split" in header else -1


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
    clusters, members = _Finder(spool, input_rows), _Finder(spool, member_rows)
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
            lists = [[name.strip() for name in row[1].split(",")] if len(row) > 1 else [] for _, row in chunk]
            found = iter(members.find(list(chain.from_iterable(lists))))
            for (line, _), head, names in zip(chunk, heads, lists):
                pairs = list(zip(names, islice(found, len(names))))
                if head < 0:
                    num_absent += 1
                    continue
                mapped[head] = True
                for name, member in pairs:
                    if member < 0:
                        rejects.add(path, line, name, "member is not in the members file")
                    elif owner[member] >= 0:
                        rejects.add(path, line, name, "member is listed a second time")
                    else:
                        owner[member] = head
        spool.sources.append(source.describe(source.line))
    if not mapped.any():
        raise ValueError(f"{path} has none of the input's ids in its first column: is it the mapping of another input?")
    return Mapping(owner, mapped, num_absent)


class _Finder:
    """Rows by id; what is not found literally is looked for without its prefix, then among ids without theirs."""

    def __init__(self, spool: Spool, rows: np.ndarray) -> None:
        self._spool, self._rows = spool, rows
        self._literal = Lookup(spool.id_keys[rows], rows)

    @cached_property
    def _bare(self) -> Lookup:  # made when first needed: real files match literally
        batches = (batch.column(0).to_pylist() for _, _, batch in self._spool.batches())
        keys = [keys_of(map(_without_prefix, names)) for names in batches]
        return Lookup(np.concatenate(keys)[self._rows], self._rows)

    def find(self, names: list[str], thorough: bool = True) -> np.ndarray:
        result = self._literal.find(keys_of(names))
        missing = np.flatnonzero(result < 0)
        bare = keys_of(_without_prefix(names[at]) for at in missing)
        result[missing] = self._literal.find(bare)
        still = result[missing] < 0
        if thorough and still.any():
            result[missing[still]] = self._bare.find(bare[still])
        return result


def _without_prefix(name: str) -> str:
    return name[len("UniRef50_") :] if name.startswith(("UniRef90_", "UniRef50_")) else name
