"""`moltron embed`: any number of records through a model, resumable, in flat memory.

    read_records ──clean──> shard of records ──Model.run──> Block ──write_shard (a thread)──> write_output
         │  too long, broken     (rank r takes every W-th)                                        rank 0
         └──> <output>.rejects.tsv

The input is cut into shards by a rule that depends on nothing but the records and the settings; a shard that is there
and carries the same fingerprint is not computed again. So the same command continues after a kill -9 at any moment,
and a changed input or setting makes exactly the shards it touches new.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from moltron import __version__
from moltron.checkpoint.weights import load_pretrained
from moltron.common.logging import Progress, get_logger
from moltron.common.manifest import read_json, write_json
from moltron.config.schema import EmbedConfig
from moltron.data.readers import Reject, read_records
from moltron.infer.api import Model
from moltron.infer.engine import Wanted, ahead
from moltron.infer.pooling import POOLINGS
from moltron.infer.windows import POLICIES
from moltron.infer.writers import FORMATS, Block, Column, Rows, is_done, write_output, write_shard
from moltron.parallel import collectives
from moltron.tokenizers.residues import clean

log = get_logger(__name__)
SHARD_BYTES = 1 << 30  # of results: what one shard holds in memory
OUTPUTS = ("embeddings", "hiddens", "logits")


@dataclass(frozen=True)
class EmbedReport:
    """sequences: in the output; rejected: in the rejects file; long: cut or windowed; reused: shards found done."""

    output: str
    sequences: int
    residues: int
    rejected: int
    long: int
    shards: int
    reused: int
    seconds: float


def embed(config: EmbedConfig) -> EmbedReport:
    """Embed every record of `config.input` into `config.output`. Under torchrun each rank calls this.

    Raises ValueError for a setting that cannot work or an output that exists; a record that cannot be embedded
    goes to `<output>.rejects.tsv` and is counted in the report.
    """
    started = time.monotonic()
    _check(config)
    device = collectives.init(config.device, timeout_minutes=7 * 24 * 60)
    output = Path(config.output)
    folder = output.with_name(output.name + ".shards")
    marker = folder / "assembling.json"
    if output.exists() and not config.overwrite:
        collectives.barrier()  # all have looked
        finished = read_json(marker) if marker.exists() else {}
        collectives.barrier()
        if finished.get("config") != dataclasses.asdict(config):
            raise ValueError(f"output={output} exists: choose another one or set overwrite=true")
        if collectives.rank() == 0:
            shutil.rmtree(folder)  # killed between the output taking its name and this
        return EmbedReport(**finished["report"])
    job = _Job(config, device, folder)
    collectives.barrier()
    if collectives.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        marker.unlink(missing_ok=True)
    collectives.barrier()
    try:
        paths = job.run()
        collectives.barrier()
        report = job.report(len(paths), time.monotonic() - started)
        if collectives.rank() == 0:
            _assemble(config, job, paths, report, marker)
    finally:
        if collectives.rank() == 0:
            with suppress(OSError):
                folder.rmdir()  # if nothing is in it
    collectives.barrier()
    return report


def _assemble(config: EmbedConfig, job: _Job, paths: list[Path], report: EmbedReport, marker: Path) -> None:
    output = Path(config.output)
    if report.sequences + report.rejected == 0:
        raise ValueError(f"input={config.input} holds no records")
    if not config.overwrite:
        write_json(marker, {"config": dataclasses.asdict(config), "report": dataclasses.asdict(report)})
    if output.suffix == ".pkl":
        log.warning("a .pkl is one list of dicts: the whole result passes through memory; .h5 and .parquet do not")
    write_output(Rows(paths, job.columns, job.settings), job.folder / f"output{output.suffix}", output)
    shutil.rmtree(job.folder)
    log.info("%d sequences in %s", report.sequences, output)
    if report.rejected:
        log.warning("%d records were rejected, see %s.rejects.tsv", report.rejected, output)


def _check(config: EmbedConfig) -> None:
    problems = []
    if Path(config.output).suffix not in FORMATS:
        problems.append(f"output={config.output}: the name must end in one of {', '.join(FORMATS)}")
    unknown = [name for name in config.outputs if name not in OUTPUTS]
    if unknown or not config.outputs:
        problems.append(f"outputs={config.outputs}: there are {', '.join(OUTPUTS)}")
    if config.pooling not in POOLINGS:
        problems.append(f"pooling={config.pooling}: there are {', '.join(POOLINGS)}")
    if config.long not in POLICIES:
        problems.append(f"long={config.long}: there are {', '.join(POLICIES)}")
    if config.dtype not in ("float32", "float16"):
        problems.append(f"dtype={config.dtype}: there are float32, float16")
    if config.shard_size < 1 or (config.tokens is not None and config.tokens < 1):
        problems.append(f"shard_size={config.shard_size} and tokens={config.tokens} must be at least 1")
    if not config.layers:
        problems.append("layers=[] asks for nothing: layers=[-1] is the last one")
    if config.input == "-" and collectives.world_size() > 1:
        problems.append("input=- can be read by one process only: give a file")
    if problems:
        raise ValueError("; ".join(problems))


@dataclass
class _Shard:
    """Consecutive records that passed. full: cut because it was full, not because the input ended."""

    index: int
    ids: list[str]
    sequences: list[bytes]
    full: bool

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for record_id, sequence in zip(self.ids, self.sequences, strict=True):
            text = record_id.encode()
            digest.update(len(text).to_bytes(8, "little") + text + len(sequence).to_bytes(8, "little") + sequence)
        return digest.hexdigest()


class _Job:
    """What is asked for, resolved against the model: columns, settings, limits; and the running counts."""

    def __init__(self, config: EmbedConfig, device: torch.device, folder: Path):
        self.config, self.folder = config, folder
        self.model = Model(load_pretrained(config.model), device, config.precision, config.tokens)
        layers = tuple(dict.fromkeys(self.model.layer_numbers(config.layers)))
        self.limit = self.model.max_residues(config.max_length)
        if config.long == "window" and not 0 <= config.overlap < self.limit:
            raise ValueError(f"overlap={config.overlap} must be less than the {self.limit} residues of a window")
        self.wanted = Wanted(
            layers=layers if {"embeddings", "hiddens"} & set(config.outputs) else (),
            pooling=config.pooling if "embeddings" in config.outputs else None,
            hiddens="hiddens" in config.outputs,
            logits="logits" in config.outputs,
            dtype=getattr(torch, config.dtype),
        )
        self.columns = self._columns(layers)
        self.settings = self._settings(layers)
        self.counts: Counter[str] = Counter()
        self.letters: Counter[str] = Counter()

    def _columns(self, layers: tuple[int, ...]) -> list[Column]:
        width, columns = self.model.config.hidden_size, []
        for name in ("embeddings", "hiddens"):
            if name in self.config.outputs:
                names = [name] if len(layers) == 1 else [f"{name}_{layer}" for layer in layers]
                columns += [Column(n, width, name == "hiddens", self.config.dtype) for n in names]
        if "logits" in self.config.outputs:
            columns.append(Column("logits", self.model.tokenizer.vocab_size, True, self.config.dtype))
        return columns

    def _settings(self, layers: tuple[int, ...]) -> dict[str, Any]:
        config, model = self.config, self.model
        return {
            "moltron": __version__,
            "model": {"family": model.spec.name, "source": str(model.source), "weights": weights_hash(model.module)},
            "tokenizer": model.tokenizer.name,
            "precision": model.encoder.precision,
            "outputs": [column.name for column in self.columns],
            "pooling": config.pooling,
            "layers": list(layers),
            "long": config.long,
            "max_residues": self.limit,
            "overlap": config.overlap if config.long == "window" else None,
            "dtype": config.dtype,
        }

    # ------------------------------------------------------------------------------------------------------ the run

    def run(self) -> list[Path]:
        """Compute this rank's shards; returns the paths of all ranks' shards, in order."""
        rank, world = collectives.rank(), collectives.world_size()
        paths = []
        with ExitStack() as stack:
            rejects = stack.enter_context(_Rejects(self.config.output, write=rank == 0))
            writer = stack.enter_context(ThreadPoolExecutor(1))
            progress = stack.enter_context(Progress("embed", None, enabled=rank == 0))
            writing: Future[None] | None = None
            started = time.monotonic()
            for shard in ahead(self._shards(rejects), depth=1):
                path = self.folder / f"{shard.index:06d}.parquet"
                paths.append(path)
                settings = {**self.settings, "records": shard.fingerprint} if shard.index % world == rank else None
                if settings is not None and is_done(path, settings):
                    self.counts["reused"] += 1
                elif settings is not None:
                    self.counts["replaced"] += path.exists()
                    block = self._compute(shard)
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(write_shard, path, block, self.columns, settings)
                    self.counts["computed"] += sum(map(len, shard.sequences))
                rate = self.counts["computed"] * world / max(1e-9, time.monotonic() - started)
                self.counts["sequences"] += len(shard.ids)
                self.counts["residues"] += sum(map(len, shard.sequences))
                progress.update(self.counts["sequences"], f"sequences, {rate:,.0f} residues/s")
            if writing is not None:
                writing.result()
            self.counts["rejected"] = rejects.count
        if self.counts["reused"]:
            log.info("%d shards of an earlier run were found done in %s", self.counts["reused"], self.folder)
        if self.counts["replaced"]:
            log.warning(
                "%d shards of other settings or records in %s were replaced", self.counts["replaced"], self.folder
            )
        if self.letters and rank == 0:
            log.warning("odd letters, by the rule of moltron.tokenizers.clean: %s", dict(self.letters))
        return paths

    def _compute(self, shard: _Shard) -> Block:
        if shard.full:
            self.model.encoder.compile()  # once; there is enough to do
        first: dict[bytes, int] = {}
        which = np.array([first.setdefault(sequence, len(first)) for sequence in shard.sequences])
        results = self.model.run(
            list(first), self.wanted, long=self.config.long, max_length=self.limit_tokens, overlap=self.config.overlap
        )
        values: dict[str, Any] = {}
        for column in self.columns:
            kind, _, layer = column.name.partition("_")
            number = int(layer) if layer else (self.wanted.layers or (0,))[0]
            if kind == "embeddings":
                values[column.name] = results.embeddings[number][which]
            else:
                rows = results.logits if kind == "logits" else results.hiddens[number]
                values[column.name] = [rows[i] for i in which]
        return Block(shard.ids, [sequence.decode("ascii") for sequence in shard.sequences], values)

    @property
    def limit_tokens(self) -> int:
        return self.limit + self.model.tokenizer.num_specials

    def _shards(self, rejects: _Rejects) -> Iterator[_Shard]:
        row_bytes = [0, 0]  # a record, a residue
        for column in self.columns:
            row_bytes[column.ragged] += column.width * np.dtype(column.dtype).itemsize
        index, ids, sequences, size = 0, [], [], 0
        for record in read_records(self.config.input, self.config.id_column, self.config.sequence_column):
            if isinstance(record, Reject):
                rejects.add(record)
                continue
            sequence, letters = clean(record.sequence)
            reason = self._reason(sequence)
            if reason:
                rejects.add(Reject(record.id, reason, record.source, record.line))
                continue
            self.letters += letters
            self.counts["long"] += len(sequence) > self.limit
            ids.append(record.id)
            sequences.append(sequence)
            size += row_bytes[0] + (row_bytes[1] + 9) * len(sequence)  # a letter and its id
            if len(ids) == self.config.shard_size or size >= SHARD_BYTES:
                yield _Shard(index, ids, sequences, full=True)
                index, ids, sequences, size = index + 1, [], [], 0
        if ids:
            yield _Shard(index, ids, sequences, full=False)

    def _reason(self, sequence: bytes) -> str | None:
        if not sequence:
            return "no residues"
        if self.config.long == "error" and len(sequence) > self.limit:
            return f"{len(sequence)} residues, the model reads {self.limit}: long=truncate or long=window embeds it"
        return None

    def report(self, shards: int, seconds: float) -> EmbedReport:
        c = self.counts
        counts = (c["sequences"], c["residues"], c["rejected"], c["long"], shards, c["reused"])
        return EmbedReport(self.config.output, *counts, round(seconds, 3))


class _Rejects:
    """`<output>.rejects.tsv`: id, source, line, reason; only there where something was rejected. Known after every
    run in full, since every run reads all records."""

    def __init__(self, output: str, write: bool):
        self.path = Path(output + ".rejects.tsv")
        self.temporary = Path(output + ".rejects.tsv.tmp")
        self.write, self.count = write, 0
        self.file: TextIO | None = None

    def add(self, reject: Reject) -> None:
        self.count += 1
        if not self.write:
            return
        if self.file is None:
            self.file = open(self.temporary, "w", encoding="utf-8")  # noqa: SIM115
            self.file.write("id\tsource\tline\treason\n")
        fields = (reject.id, reject.source, str(reject.line), reject.reason)
        self.file.write("\t".join(" ".join(field.split()) for field in fields) + "\n")

    def __enter__(self) -> _Rejects:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self.file is not None:
            self.file.close()
        if self.write and kind is None:
            if self.file is not None:
                os.replace(self.temporary, self.path)
            else:
                self.path.unlink(missing_ok=True)


def weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over names and bytes of all weights, as they are computed with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
