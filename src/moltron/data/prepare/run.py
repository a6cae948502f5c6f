"""From FASTA, CSV or SMILES to a folder that training reads: two passes over the records, memory by keys only.

    inputs ──Spool (pass 1)──> keys ──read_clusters | read_mapping──decide──> split of each row
    spool.arrow ──pass 2──> {train,val,test}.arrow, *.clusters.*.npy, rejects.tsv ──> manifest.json, lengths.png

Everything is written to a sibling folder that takes its name at the end. In memory: 33 bytes a record (keys of id
and sequence, role), 64 more for a moment while equal ones are looked for and splits drawn (measured at 10 million:
1 GB in all); the rest is a few record batches.
Knows nothing of tokens and of who will read the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moltron.common.manifest import staged_folder, write_json
from moltron.config.schema import PrepareConfig
from moltron.data.prepare.clusters import Assignment, Mapping, read_clusters, read_mapping
from moltron.data.prepare.report import Statistics, draw_lengths
from moltron.data.prepare.splits import MEMBER, NAMES, REASONS, TEST, TRAIN, UNUSED, VAL, Decision, decide
from moltron.data.prepare.spool import Rejects, Spool
from moltron.data.readers import expand_inputs
from moltron.data.store import BATCH_BYTES, MANIFEST, Clusters, Store, StoreWriter, describe

FORMAT = "moltron-data/1"


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes `config.output` and returns its manifest.

    Keys of the manifest: format, moltron, kind, settings, sources (path, bytes, sha256, records), records (read, kept,
    rejected, unused), cleaning (letters by change, see tokenizers.clean), rejects (records by reason), splits ({name:
    files, records, residues, clusters, lengths, alphabet}), clusters (what did not fit), files.

    Raises: ValueError for settings that contradict each other, unreadable input, an existing output, an empty result.
    """
    _check(config)
    inputs = [(config.input, TRAIN), (config.members, MEMBER), (config.val_input, VAL), (config.test_input, TEST)]
    named = [(path, role) for path, role in inputs if path is not None]
    with ExitStack() as stack:
        stage = stack.enter_context(staged_folder(config.output, MANIFEST, config.overwrite))
        rejects = stack.enter_context(closing(Rejects(stage / "rejects.tsv")))
        advance = stack.enter_context(_progress([path for path, _ in named]))
        spool = Spool(stage / "spool.arrow", config, rejects, advance)
        with closing(spool):
            for path, role in named:
                spool.read(path, role)
        if not len(spool):
            raise ValueError(
                f"{config.input}: none of its {spool.num_read} records can be used: {dict(rejects.counts)}"
            )
        table, mapping = _read_clusters(config, spool, rejects)
        decision = decide(spool, config, table, mapping)
        statistics = _write(stage, spool, decision, rejects)
        spool.remove()
        rejects.close()
        manifest = {
            "format": FORMAT,
            "moltron": version("moltron"),
            "kind": spool.kind,
            "settings": asdict(config),
            "sources": spool.sources,
            "records": _count(spool, decision, rejects),
            "cleaning": dict(spool.cleaning),
            "rejects": dict(rejects.counts.most_common()),
            "splits": {name: _describe(stage, name, s, decision) for name, s in statistics.items()},
            "clusters": _clusters_summary(table, mapping),
        }
        draw_lengths(stage / "lengths.png", statistics, spool.kind or "protein")
        write_json(stage / MANIFEST, manifest)
        for name in statistics:  # makes the index, and proves that what was written can be read
            Store.open(stage / f"{name}.arrow")
    return manifest


def _check(config: PrepareConfig) -> None:
    """Raises: ValueError with every problem."""
    problems = []
    for name, allowed in {
        "kind": (None, "protein", "molecule"),
        "illegal": ("x", "reject"),
        "duplicates": ("drop", "keep"),
    }.items():
        if getattr(config, name) not in allowed:
            choices = ", ".join(str(a) for a in allowed if a)
            problems.append(f"{name}={getattr(config, name)}: choose from {choices}")
    for split in NAMES[1:]:
        size = getattr(config, f"{split}_size")
        if size < 0 or (size > 1 and size != int(size)):
            problems.append(f"{split}_size={size}: a whole number counts, a fraction lies between 0 and 1")
        if size and getattr(config, f"{split}_input"):
            problems.append(f"{split}_size and {split}_input are both set: choose one")
    if (config.members is None) != (config.mapping is None):
        problems.append("members and mapping belong together: set both")
    if config.clusters and config.mapping:
        problems.append("clusters and mapping are both set: choose one")
    if config.cluster_column and not config.clusters:
        problems.append("cluster_column is set without clusters")
    if config.min_length < 1 or (config.max_length is not None and config.max_length < config.min_length):
        problems.append(f"1 <= min_length={config.min_length} <= max_length={config.max_length} must hold")
    if [config.input, config.val_input, config.test_input, config.members].count("-") > 1:
        problems.append("only one input can be standard input")
    if problems:
        raise ValueError("; ".join(problems))


def _read_clusters(config: PrepareConfig, spool: Spool, rejects: Rejects) -> tuple[Assignment | None, Mapping | None]:
    own = np.flatnonzero(spool.role == TRAIN)
    if config.mapping is not None:
        return None, read_mapping(config.mapping, spool, own, np.flatnonzero(spool.role == MEMBER), rejects)
    if config.clusters is None:
        return None, None
    table = read_clusters(config.clusters, config.cluster_column, spool, own, rejects)
    if table.split is not None and (config.val_size or config.test_size):
        raise ValueError(f"{config.clusters} has a column `split`: it rules, leave val_size and test_size out")
    return table, None


def _write(stage: Path, spool: Spool, decision: Decision, rejects: Rejects) -> dict[str, Statistics]:
    """Pass 2. -> statistics of the splits that are not empty."""
    present = [split for split in (TRAIN, VAL, TEST) if (decision.split == split).any()]
    if TRAIN not in present and VAL not in present and TEST not in present:
        raise ValueError(f"no record is left: {dict(rejects.counts)}")
    statistics = {split: Statistics() for split in present}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(_Gather(stage / f"{NAMES[split]}.arrow", spool.kind or "protein"))
            for split in present
        }
        for rows, source, batch in spool.batches():
            split, reason = decision.split[rows], decision.reason[rows]
            for at in np.flatnonzero((reason > 0) & (reason != UNUSED)):
                rejects.add(batch[0][at].as_py(), REASONS[int(reason[at])], source, batch[2][at].as_py())
            for name, writer in writers.items():
                chosen = batch.filter(pa.array(split == name)).select([0, 1])
                statistics[name].add(chosen.column(1))
                writer.add(chosen)
    if decision.cluster is not None and TRAIN in present:
        _group(decision.cluster[decision.split == TRAIN]).save(stage / "train.arrow")
    return {NAMES[split]: s for split, s in statistics.items()}


class _Gather:
    """Joins the pieces of a small split into record batches of a good size."""

    def __init__(self, path: Path, alphabet: str) -> None:
        self._writer = StoreWriter(path, alphabet)
        self._pieces: list[pa.RecordBatch] = []
        self._bytes = 0

    def add(self, piece: pa.RecordBatch) -> None:
        self._pieces.append(piece)
        self._bytes += piece.nbytes
        if self._bytes >= BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        whole = pa.Table.from_batches(self._pieces).combine_chunks()
        for batch in whole.to_batches():
            self._writer.add_columns(batch.column(0), batch.column(1))
        self._pieces, self._bytes = [], 0

    def __enter__(self) -> _Gather:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pieces:
            self._flush()
        self._writer.close()


def _group(cluster: np.ndarray) -> Clusters:
    """(N,) any numbers -> clusters in the order of their numbers, members in the order of their rows."""
    order = np.argsort(cluster, kind="stable")
    _, start, count = np.unique(cluster[order], return_index=True, return_counts=True)
    return Clusters(start, count, order)


def _count(spool: Spool, decision: Decision, rejects: Rejects) -> dict[str, int]:
    kept = int((decision.split >= 0).sum())
    unused = int((decision.reason == UNUSED).sum())
    return {"read": spool.num_read, "kept": kept, "unused": unused, "rejected": spool.num_read - kept - unused}


def _describe(stage: Path, name: str, statistics: Statistics, decision: Decision) -> dict[str, Any]:
    entry: dict[str, Any] = {"files": describe(stage / f"{name}.arrow"), **statistics.summary()}
    if decision.cluster is not None:
        entry["clusters"] = len(np.unique(decision.cluster[decision.split == NAMES.index(name)]))
    return entry


def _clusters_summary(table: Assignment | None, mapping: Mapping | None) -> dict[str, int]:
    if table is not None:
        return {"records_in_no_cluster": table.num_alone}  # each became a cluster of its own
    return {} if mapping is None else {"clusters_not_in_input": mapping.num_absent}


@contextmanager
def _progress(paths: list[str]) -> Iterator[Callable[[int], None]]:
    """A bar over all inputs' bytes, on standard error if that is a terminal. Yields advance(bytes of the file)."""
    console = Console(stderr=True)
    files = [file for path in paths for file in expand_inputs(path)]
    total = None if "-" in files else sum(Path(file).stat().st_size for file in files)
    columns = TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading", total=total)
        done = [0, 0]  # of earlier files, of this one

        def advance(count: int) -> None:
            if count < done[1]:
                done[0] += done[1]
            done[1] = count
            bar.update(task, completed=sum(done))

        yield advance
