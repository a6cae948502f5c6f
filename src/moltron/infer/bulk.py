"""`moltron embed`: any number of records through a model, resumable, in flat memory.

    read_records ──clean──> shard of records ──Model.run──> results ──write_shard (a thread)──> write_output
         │  too long, broken     (rank r takes every W-th)                                          rank 0
         └──> <output>.rejects.tsv

The input is cut into shards by a rule that depends on nothing but the records and the settings; a shard that is there
and carries the same fingerprint is not computed again. So the same command continues after a kill -9 at any moment,
and a changed input or setting makes exactly the shards it touches new.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moltron import __version__
from moltron.checkpoint.weights import load_pretrained
from moltron.common.lock import locked
from moltron.common.logging import Progress, get_logger
from moltron.common.manifest import read_json, write_json
from moltron.config.schema import EmbedConfig
from moltron.data.readers import Reject, read_records, reject_table
from moltron.infer.api import Model
from moltron.infer.chemistry import Judges
from moltron.infer.engine import POOLINGS, Wanted, ahead
from moltron.infer.windows import POLICIES, default_overlap
from moltron.infer.writers import FORMATS, Column, Rows, is_done, write_output, write_shard
from moltron.parallel import collectives

log = get_logger(__name__)
SHARD_BYTES = 1 << 30  # of results: what one shard holds in memory
CHOICES = {
    "outputs": ("embeddings", "hiddens", "logits"),
    "pooling": POOLINGS,
    "long": POLICIES,
    "dtype": ("float32", "float16"),
    "device": collectives.DEVICES,
}


@dataclass
class EmbedReport:
    """Counts of records: in the output, in the rejects file, `long` ones (cut or windowed); and of shards: of all
    ranks, and those of this rank that were found done."""

    sequences: int = 0
    rejected: int = 0
    long: int = 0
    shards: int = 0
    reused: int = 0


def embed(config: EmbedConfig) -> EmbedReport:
    """Embed every record of `config.input` into `config.output`. Under torchrun each rank calls this.

    Raises ValueError for a setting that cannot work or an output that exists; a record that cannot be embedded
    goes to `<output>.rejects.tsv` and is counted in the report.
    """
    _check(config)
    device = collectives.init(config.device, timeout_minutes=7 * 24 * 60)
    output = Path(config.output)
    folder = output.with_name(output.name + ".shards")
    marker = folder / "assembling.json"  # a command that was killed when its output perhaps had its name already
    if output.exists() and not config.overwrite and not (marker.exists() and read_json(marker) == asdict(config)):
        raise ValueError(f"output={output} exists: choose another one or set overwrite=true")
    job = _Job(config, device, folder)
    collectives.barrier()  # all have looked
    lock = output.with_name(output.name + ".lock")
    with locked(lock, collectives.rank(), collectives.broadcast_object):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            job.run()
            collectives.barrier()
            if collectives.rank() == 0:
                _assemble(config, job, marker)
        finally:
            if collectives.rank() == 0:
                job.rejects.unlink(missing_ok=True)
                with suppress(OSError):
                    folder.rmdir()  # if nothing is in it
        collectives.barrier()
    return job.report


def _assemble(config: EmbedConfig, job: _Job, marker: Path) -> None:
    output, report = Path(config.output), job.report
    if report.sequences + report.rejected == 0:
        raise ValueError(f"input={config.input} holds no records")
    rejects = Path(config.output + ".rejects.tsv")
    rejects.unlink(missing_ok=True)
    if report.rejected:
        os.replace(job.rejects, rejects)
        log.warning("%d records were rejected, see %s", report.rejected, rejects)
    if not config.overwrite:
        write_json(marker, asdict(config))
    if output.suffix == ".pkl":
        log.warning("a .pkl is one list of dicts: the whole result passes through memory; .h5 and .parquet do not")
    write_output(Rows(job.shards, job.columns, job.settings), job.folder / f"output{output.suffix}", output)
    shutil.rmtree(job.folder)
    log.info("%d sequences in %s", report.sequences, output)


def _check(config: EmbedConfig) -> None:
    problems = []
    if Path(config.output).suffix not in FORMATS:
        problems.append(f"output={config.output}: the name must end in one of {', '.join(FORMATS)}")
    for key, known in CHOICES.items():
        value = getattr(config, key)
        if not value or set([value] if isinstance(value, str) else value) - set(known):
            problems.append(f"{key}={value}: there are {', '.join(known)}")
    if config.shard_size < 1 or (config.tokens is not None and config.tokens < 1):
        problems.append(f"shard_size={config.shard_size} and tokens={config.tokens} must be at least 1")
    if not config.layers:
        problems.append("layers=[] asks for nothing: layers=[-1] is the last one")
    if config.input == "-" and collectives.world_size() > 1:
        problems.append("input=- can be read by one process only: give a file")
    if problems:
        raise ValueError("; ".join(problems))


class _Job:
    """What is asked for, resolved against the model: columns, settings, limit; and what came of it so far."""

    def __init__(self, config: EmbedConfig, device: torch.device, folder: Path):
        self.config, self.folder, self.rejects = config, folder, folder / "rejects.tsv"
        self.model = model = Model(load_pretrained(config.model), device, config.precision, config.tokens)
        self.layers = tuple(dict.fromkeys(model.layer_numbers(config.layers)))
        self.limit = model.max_residues(config.max_length)
        self.overlap = default_overlap(self.limit) if config.overlap is None else config.overlap
        if config.long == "window" and not 0 <= self.overlap < self.limit:
            raise ValueError(f"overlap={self.overlap} must be less than the {self.limit} residues of a window")
        embeddings, hiddens, logits = (name in config.outputs for name in CHOICES["outputs"])
        if embeddings:
            model.check_pooling(config.pooling)
        pooling, dtype = config.pooling if embeddings else None, getattr(torch, config.dtype)
        self.wanted = Wanted(self.layers if embeddings or hiddens else (), pooling, hiddens, logits, dtype)
        self.columns = [
            Column(self._name(kind, layer), model.config.hidden_size, kind == "hiddens", config.dtype)
            for kind in ("embeddings", "hiddens")
            for layer in self.layers
            if kind in config.outputs
        ]
        if logits:
            self.columns.append(Column("logits", model.tokenizer.vocab_size, True, config.dtype))
        self.settings: dict[str, Any] = {
            "moltron": __version__,
            "model": {"family": model.spec.name, "source": str(model.source), "weights": weights_hash(model.module)},
            "tokenizer": model.tokenizer.name,
            "precision": model.encoder.precision,
            "outputs": [column.name for column in self.columns],
            "pooling": config.pooling,
            "layers": list(self.layers),
            "long": config.long,
            "max_residues": self.limit,
            "overlap": self.overlap if config.long == "window" else None,
            "dtype": config.dtype,
        }
        self.report = EmbedReport()
        self.shards: list[Path] = []  # of all ranks, in order
        self.letters: Counter[str] = Counter()

    def _name(self, kind: str, layer: int) -> str:
        return kind if len(self.layers) == 1 else f"{kind}_{layer}"

    def run(self) -> None:
        """Compute this rank's shards, and list the rejects."""
        rank, world = collectives.rank(), collectives.world_size()
        rejects = self.rejects if rank == 0 else os.devnull
        writing: list[Future[None]] = []
        computed, started = 0, time.monotonic()
        with (
            open(rejects, "w", encoding="utf-8", errors="replace", newline="") as file,
            ThreadPoolExecutor(1) as writer,
            Judges() as judging,
            Progress("embed", None, enabled=rank == 0) as progress,
        ):
            for index, (ids, sequences, is_full) in enumerate(ahead(self._read(reject_table(file), judging), depth=1)):
                path = self.folder / f"{index:06d}.parquet"
                self.shards.append(path)
                self.report.shards += 1
                self.report.sequences += len(ids)
                if index % world == rank:
                    fingerprint = hashlib.sha256(repr((ids, sequences)).encode()).hexdigest()
                    settings = {**self.settings, "records": fingerprint}
                    if is_done(path, settings):
                        self.report.reused += 1
                    else:
                        if is_full:
                            self.model.encoder.compile()  # once; there is enough to do
                        records = self._compute(ids, sequences)
                        while writing:
                            writing.pop().result()
                        writing.append(writer.submit(write_shard, path, records, self.columns, settings))
                        computed += sum(map(len, sequences)) * world
                rate = computed / (time.monotonic() - started)
                progress.update(self.report.sequences, f"sequences, {rate:,.0f} residues/s")
            while writing:
                writing.pop().result()
        if self.report.reused:
            log.info("%d shards of an earlier run were found done in %s", self.report.reused, self.folder)
        if (letters := dict(+self.letters)) and rank == 0:
            log.warning("odd letters, by the rule of moltron.tokenizers.clean: %s", letters)

    def _compute(self, ids: list[str], sequences: list[bytes]) -> dict[str, Any]:
        """What `write_shard` writes; equal sequences are computed once."""
        first: dict[bytes, int] = {}
        which = np.array([first.setdefault(sequence, len(first)) for sequence in sequences])
        c = self.config
        results = self.model.run(list(first), self.wanted, long=c.long, max_length=c.max_length, overlap=self.overlap)
        records: dict[str, Any] = {"id": ids, "sequence": [sequence.decode("ascii") for sequence in sequences]}
        for layer, vectors in results.pooled.items():
            records[self._name("embeddings", layer)] = vectors[which]
        for layer, rows in results.hiddens.items():
            records[self._name("hiddens", layer)] = [rows[i] for i in which]
        if self.wanted.logits:
            records["logits"] = [results.logits[i] for i in which]
        return records

    def _read(self, rejects: Any, judging: Judges) -> Iterator[tuple[list[str], list[bytes], bool]]:
        """Shards (ids, sequences, is it full), cut by number and size of results; the rest goes to `rejects`."""
        config, itemsize = self.config, np.dtype(self.config.dtype).itemsize
        a_record = itemsize * sum(c.width for c in self.columns if not c.ragged)
        a_residue = itemsize * sum(c.width for c in self.columns if c.ragged) + 9  # a letter and its id
        ids, sequences, size = [], [], 0
        tokenizer = self.model.tokenizer
        records = read_records(config.input, config.id_column, config.sequence_column, tokenizer)
        for record in judging.check(records) if tokenizer.alphabet == "molecule" else records:
            if isinstance(record, Reject):
                sequence, letters, reason = b"", {}, record.reason
            else:
                sequence, letters = tokenizer.clean(record.sequence)
                reason = None if sequence else "no residues"
            length = len(codes := tokenizer.codes(sequence))
            if length > self.limit and config.long == "error":
                remedy = "long=truncate or long=window embeds it"
                reason = f"{length} residues, the model reads {self.limit}: {remedy}"
            if reason is not None:
                self.report.rejected += 1
                rejects.writerow(Reject(record.source, record.line, record.id, reason))
                continue
            self.letters.update(letters, unknown_tokens=codes.count(0))
            self.report.long += length > self.limit
            ids.append(record.id)
            sequences.append(sequence)
            size += a_record + a_residue * length
            if len(ids) == config.shard_size or size >= SHARD_BYTES:
                yield ids, sequences, True
                ids, sequences, size = [], [], 0
        if ids:
            yield ids, sequences, False


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights, as they are computed with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
