"""From FASTA, CSV or SMILES to a folder that training reads: two passes over the records, memory by keys only.

    inputs ──Spool (pass 1)──> keys ──read_clusters | read_mapping──decide──> split of each row
    spool.arrow ──pass 2──> {train,val,test}.arrow, *.clusters.*.npy, rejects.tsv ──> manifest.json, lengths.png

Everything is written to a sibling folder that takes its name at the end. In memory: 17 bytes a record (keys of id
and sequence, role), 100 more for a moment while equal ones are looked for and splits drawn; the rest is a few
record batches. Knows nothing of tokens and of who will read the folder.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from moltron.common.logging import Progress
from moltron.common.manifest import staged_folder, write_json
from moltron.config.schema import PrepareConfig
from moltron.data.prepare.clusters import Assignment, Mapping, read_clusters, read_mapping
from moltron.data.prepare.report import Statistics, draw_lengths
from moltron.data.prepare.splits import MEMBER, NAMES, REASONS, TEST, TRAIN, UNUSED, VAL, Decision, decide
from moltron.data.prepare.spool import Rejects, Spool
from moltron.data.readers import expand_inputs
from moltron.data.store import MANIFEST, Clusters, Store, StoreWriter, describe

FORMAT = "moltron-data/1"


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Writes `config.output` and returns its manifest.

    Keys of the manifest: format, moltron, kind, settings, sources (path, bytes, sha256, records), records (read, kept,
    rejected, unused), cleaning (letters by change, see tokenizers.clean), rejects (records by reason), splits ({name:
    files, records, residues, clusters, lengths, alphabet}), clusters (what did not fit).

    Raises: ValueError for settings that contradict each other, unreadable input, an existing output, an empty result.
    """
    _check(config)
    inputs = {TRAIN: config.input, MEMBER: config.members, VAL: config.val_input, TEST: config.test_input}
    with ExitStack() as stack:
        stage = stack.enter_context(staged_folder(config.output, MANIFEST, config.overwrite))
        rejects = stack.enter_context(closing(Rejects(stage / "rejects.tsv")))
        files = {role: expand_inputs(path) for role, path in inputs.items() if path is not None}
        sizes = [None if file == "-" else Path(file).stat().st_size for named in files.values() for file in named]
        total = None if None in sizes else sum(filter(None, sizes)) >> 20
        progress = Progress("reading, MiB", total)
        with progress, closing(Spool(stage / "spool.arrow", config, rejects, progress)) as spool:
            for role, named in files.items():
                spool.read(named, role)
        if not len(spool):
            raise ValueError(
                f"{config.input}: none of its {spool.num_read} records can be used: {dict(rejects.counts)}"
            )
        table, mapping = _read_clusters(config, spool, rejects)
        decision = decide(spool, config, table, mapping)
        statistics = _write(stage, spool, decision, rejects)
        (stage / "spool.arrow").unlink()
        rejects.close()
        kept, unused = int((decision.split >= 0).sum()), int((decision.reason == UNUSED).sum())
        rejected = spool.num_read - kept - unused
        manifest = {
            "format": FORMAT,
            "moltron": version("moltron"),
            "kind": spool.kind,
            "settings": asdict(config),
            "sources": spool.sources,
            "records": {"read": spool.num_read, "kept": kept, "unused": unused, "rejected": rejected},
            "cleaning": dict(spool.cleaning),
            "rejects": dict(rejects.counts.most_common()),
            "splits": {name: _describe(stage, name, s, decision) for name, s in statistics.items()},
            "clusters": {},
        }
        if table is not None:
            manifest["clusters"]["records_in_no_cluster"] = table.num_alone  # each became a cluster of its own
        elif mapping is not None:
            manifest["clusters"]["clusters_not_in_input"] = mapping.num_absent
        draw_lengths(stage / "lengths.png", statistics, spool.kind or "protein")
        write_json(stage / MANIFEST, manifest)
        for name in statistics:  # makes the index, and proves that what was written can be read
            Store.open(stage / f"{name}.arrow")
    return manifest


def _check(config: PrepareConfig) -> None:
    """Raises: ValueError with every problem."""
    problems = []
    choices = {"kind": (None, "protein", "molecule"), "illegal": ("x", "reject"), "duplicates": ("drop", "keep")}
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
    present = {split: NAMES[split] for split in (TRAIN, VAL, TEST) if (decision.split == split).any()}
    if not present:
        raise ValueError(f"no record is left: {dict(rejects.counts)}")
    statistics = {name: Statistics() for name in present.values()}
    with ExitStack() as stack:
        alphabet = spool.kind or "protein"
        writers = {n: stack.enter_context(StoreWriter(stage / f"{n}.arrow", alphabet)) for n in present.values()}
        for rows, source, batch in spool.batches():
            split, reason = decision.split[rows], decision.reason[rows]
            for at in np.flatnonzero((reason > 0) & (reason != UNUSED)):
                rejects.add(batch[0][at].as_py(), REASONS[int(reason[at])], source, batch[2][at].as_py())
            for number, name in present.items():
                chosen = batch.filter(pa.array(split == number))
                if len(chosen):
                    statistics[name].add(chosen[1])
                    writers[name].add(chosen[0], chosen[1])
    if decision.cluster is not None and TRAIN in present:
        cluster = decision.cluster[decision.split == TRAIN]
        order = np.argsort(cluster, kind="stable")  # clusters by number, members by row
        _, start, count = np.unique(cluster[order], return_index=True, return_counts=True)
        Clusters(start, count, order).save(stage / "train.arrow")
    return statistics


def _describe(stage: Path, name: str, statistics: Statistics, decision: Decision) -> dict[str, Any]:
    entry: dict[str, Any] = {"files": describe(stage / f"{name}.arrow"), **statistics.summary()}
    if decision.cluster is not None:
        entry["clusters"] = len(np.unique(decision.cluster[decision.split == NAMES.index(name)]))
    return entry
