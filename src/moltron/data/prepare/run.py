"""From FASTA, CSV or SMILES to a folder that training reads: two passes over the records, memory by keys only.

    inputs ──Spool (pass 1)──> keys ──read_clusters | read_mapping──decide──> split of each row
    spool.arrow ──pass 2──> {train,val,test}.arrow, *.clusters.*.npy, rejects.tsv ──> manifest.json, lengths.png
                   └ molecules: their variants and tokens

Everything is written to a sibling folder that takes its name at the end. In memory: 17 bytes a record (keys of id
and sequence, role), 100 more for a moment while equal ones are looked for and splits drawn; the rest is a few
record batches. Knows nothing of who will read the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import moltron
from moltron.common.logging import Progress
from moltron.common.manifest import staged_folder, write_json
from moltron.config.schema import PrepareConfig
from moltron.data.prepare.clusters import Assignment, Mapping, read_clusters, read_mapping
from moltron.data.prepare.molecules import CHUNK, TOKENIZER, Workers, write_rows
from moltron.data.prepare.report import Statistics, draw_lengths
from moltron.data.prepare.splits import MEMBER, NAMES, REASONS, TEST, TRAIN, UNUSED, VAL, Decision, decide
from moltron.data.prepare.spool import Rejects, Spool
from moltron.data.readers import expand_inputs
from moltron.data.store import MANIFEST, Clusters, Store, StoreWriter, describe
from moltron.tokenizers import get_tokenizer

FORMAT = "moltron-data/1"
_BATCH_ROWS = 1 << 16  # of molecules and variants


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes `config.output` and returns its manifest.

    Keys of the manifest: format, moltron, kind, tokenizer (of molecules), settings, sources (path, bytes, sha256,
    records), records (read, kept, rejected, unused), cleaning (letters by change, see tokenizers.clean; molecules: see
    molecules), rejects (records by reason), splits ({name: files, records, residues or tokens, clusters, lengths,
    alphabet}; a molecule is 1 + variants records), clusters (what did not fit).

    Raises: ValueError for settings that contradict each other, unreadable input, an existing output, an empty result.
    """
    _check(config)
    inputs = {TRAIN: config.input, MEMBER: config.members, VAL: config.val_input, TEST: config.test_input}
    with ExitStack() as stack:
        stage = stack.enter_context(staged_folder(config.output, MANIFEST, config.overwrite))
        rejects = stack.enter_context(closing(Rejects(stage / "rejects.tsv")))
        files = {role: expand_inputs(path) for role, path in inputs.items() if path is not None}
        sizes = [None if file == "-" else Path(file).stat().st_size for named in files.values() for file in named]
        total = None if None in sizes else sum(filter(None, sizes)) >> 10
        progress = Progress("reading, KiB", total)
        workers = stack.enter_context(Workers(config.workers))
        with progress, closing(Spool(stage / "spool.arrow", config, rejects, progress, workers)) as spool:
            for role, named in files.items():
                spool.read(named, role)
        if not spool.num_read:
            raise ValueError(f"{config.input} holds no records")
        if not len(spool):
            raise ValueError(
                f"{config.input}: none of its {spool.num_read} records can be used: {dict(rejects.counts)}"
            )
        table, mapping = _read_clusters(config, spool, rejects)
        decision = decide(spool, config, table, mapping)
        statistics = _write(stage, spool, decision, rejects, config, workers)
        (stage / "spool.arrow").unlink()
        rejects.close()
        kept, unused = int((decision.split >= 0).sum()), int((decision.reason == UNUSED).sum())
        rejected = spool.num_read - kept - unused
        manifest = {
            "format": FORMAT,
            "moltron": moltron.__version__,
            "kind": spool.kind,
            **({"tokenizer": TOKENIZER} if spool.kind == "molecule" else {}),
            "settings": asdict(config),
            "sources": spool.sources,
            "records": {"read": spool.num_read, "kept": kept, "unused": unused, "rejected": rejected},
            "cleaning": dict(spool.cleaning),
            "rejects": dict(rejects.counts.most_common()),
            "splits": {name: _describe(stage, name, s, decision, spool, config) for name, s in statistics.items()},
            "clusters": {},
        }
        if table is not None:
            manifest["clusters"]["records_in_no_cluster"] = table.num_alone  # each became a cluster of its own
            manifest["clusters"]["members_not_in_input"] = table.num_absent
        elif mapping is not None:
            manifest["clusters"]["clusters_not_in_input"] = mapping.num_absent
        draw_lengths(stage / "lengths.png", statistics)
        write_json(stage / MANIFEST, manifest)
        for name in statistics:  # makes the index, and proves that what was written can be read
            Store.open(stage / f"{name}.arrow")
    return manifest


def _check(config: PrepareConfig) -> None:
    """Raises: ValueError with every problem."""
    problems = []
    choices = {"kind": (None, "protein", "molecule"), "illegal": ("x", "reject"), "duplicates": ("drop", "keep")}
    choices["salts"] = ("keep", "strip")
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            problems.append(f"{name}={getattr(config, name)}: choose from {', '.join(filter(None, allowed))}")
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
    if config.variants < 0 or (config.workers is not None and config.workers < 1):
        problems.append(f"variants={config.variants} >= 0 and workers={config.workers} >= 1 must hold")
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


def _write(
    stage: Path, spool: Spool, decision: Decision, rejects: Rejects, config: PrepareConfig, workers: Workers
) -> dict[str, Statistics]:
    """Pass 2. -> statistics of the splits that are not empty."""
    present = {split: NAMES[split] for split in (TRAIN, VAL, TEST) if (decision.split == split).any()}
    if not present:
        raise ValueError(f"no record is left: {dict(rejects.counts)}")
    if TRAIN not in present and (config.val_input or config.test_input):
        raise ValueError(
            "nothing is left to train on: each record of input is rejected, or in val_input or test_input, too"
        )
    molecules = spool.kind == "molecule"
    names = None
    if molecules:
        tokenizer = get_tokenizer(TOKENIZER)
        names = [tokenizer.pieces[index] for index in tokenizer.table]
    statistics = {name: Statistics(names) for name in present.values()}
    with ExitStack() as stack:
        alphabet = spool.kind or "protein"
        writers = {
            name: stack.enter_context(StoreWriter(stage / f"{name}.arrow", alphabet, tokens=molecules))
            for name in present.values()
        }
        kept = _kept(spool, decision, rejects, present)
        for name, batch in _rows(kept, int((decision.split >= 0).sum()), spool, config, workers) if molecules else kept:
            statistics[name].add(batch[-1])  # the tokens, where there are any
            writers[name].add(*batch)
    if molecules and config.variants:
        for number, name in present.items():
            count = int((decision.split == number).sum())
            Clusters.save_equal(stage / f"{name}.arrow", count, config.variants + 1)
    if decision.cluster is not None and TRAIN in present:
        cluster = decision.cluster[decision.split == TRAIN]
        order = np.argsort(cluster, kind="stable")  # clusters by number, members by row
        _, start, count = np.unique(cluster[order], return_index=True, return_counts=True)
        Clusters(start, count, order).save(stage / "train.arrow")
    return statistics


def _kept(
    spool: Spool, decision: Decision, rejects: Rejects, present: dict[int, str]
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Split, id and sequence of what is kept, in the order read; the rest goes to the rejects."""
    for rows, source, batch in spool.batches():
        split, reason = decision.split[rows], decision.reason[rows]
        for at in np.flatnonzero((reason > 0) & (reason != UNUSED)):
            rejects.add(source, batch[2][at].as_py(), batch[0][at].as_py(), REASONS[int(reason[at])])
        for number, name in present.items():
            chosen = batch.filter(pa.array(split == number))
            if len(chosen):
                yield name, chosen.select(["id", "sequence"])


def _rows(
    kept: Iterable[tuple[str, pa.RecordBatch]], total: int, spool: Spool, config: PrepareConfig, workers: Workers
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Split, and a record batch of molecules with their variants and tokens."""
    tasks = ((name, batch.slice(at, CHUNK)) for name, batch in kept for at in range(0, len(batch), CHUNK))
    waiting: dict[str, list[pa.RecordBatch]] = {}
    done = 0
    with Progress("writing, molecules", total) as progress:
        for name, (rows, counts) in workers.map(write_rows, tasks, config):
            spool.cleaning.update(counts)
            parts = waiting.setdefault(name, [])
            parts.append(rows)
            done += len(rows) // (config.variants + 1)
            progress.update(done)
            if sum(map(len, parts)) >= _BATCH_ROWS:
                yield name, _joined(waiting.pop(name))
    for name, parts in waiting.items():
        yield name, _joined(parts)


def _joined(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def _describe(
    stage: Path, name: str, statistics: Statistics, decision: Decision, spool: Spool, config: PrepareConfig
) -> dict[str, Any]:
    entry: dict[str, Any] = {"files": describe(stage / f"{name}.arrow"), **statistics.summary()}
    if spool.kind == "molecule" and config.variants:
        entry["clusters"] = entry["records"] // (config.variants + 1)
    if decision.cluster is not None:
        entry["clusters"] = len(np.unique(decision.cluster[decision.split == NAMES.index(name)]))
    return entry
