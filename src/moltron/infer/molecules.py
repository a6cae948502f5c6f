"""`moltron generate`: molecules in, new ones near or between them out, and what came of it.

    read_records ──RDKit, clean──> seeds ──Model.hiddens──> explore | interpolate ──> SMILES ──judge──> OUTPUT.csv
         └── broken, too long ──> OUTPUT.csv.rejects.tsv                OUTPUT.json (report), OUTPUT.png (molecules)

In memory: one chunk of seeds, and the canonical SMILES of the reference. What is made of a seed depends on its number
in the input, never on how the work is cut up; a command that was stopped goes on after its last chunk.
"""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moltron.checkpoint.weights import load_pretrained
from moltron.common.lock import locked
from moltron.common.logging import Progress, get_logger, setup_logging
from moltron.common.manifest import fsync, read_json, write_json
from moltron.config.schema import GenerateConfig
from moltron.data.readers import Reject, read_records, reject_table
from moltron.data.store import Store
from moltron.infer.api import Model
from moltron.infer.bulk import weights_hash
from moltron.infer.chemistry import SEEDS, Judged, Judges, canonical, draw_grid, judge
from moltron.infer.engine import Wanted
from moltron.infer.generate import Hypothesis, penalty
from moltron.infer.sampling import METHODS, Sampling, interpolate
from moltron.parallel.collectives import find_device
from moltron.tokenizers import Tokenizer

log = get_logger(__name__)
INTERPOLATE = "interpolate"
CHUNK = 10_000  # molecules generated between two writes
COLUMNS = ("id", "input", "sample", "smiles", "valid", "log_probability", "qed", "similarity", "novel")


class Seed(NamedTuple):
    number: int  # of the usable records, from 0
    id: str
    smiles: str


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Write the table, the picture and the report; returns the report.

    Its shares: validity, valid (ended, read by RDKit) of all generated; uniqueness, different ones of a seed's valid
    ones, mean over seeds; novelty, of the valid ones those not in the reference and not the seed; nuv, of all generated
    those that are valid, novel and the first of their kind of a seed. qed and similarity are means over the valid ones,
    None without any.
    Raises ValueError for settings that cannot work, a model without a decoder, or an output that exists.
    """
    sampling = _check(config)
    setup_logging()
    output = Path(config.output)
    there = [path for path in map(output.with_suffix, (".csv", ".json", ".png")) if path.exists()]
    if there and not config.overwrite and (output in there or not Path(f"{output}.partial.json").exists()):
        raise ValueError(f"{there[0]} exists: choose another output= or set overwrite=true")
    model = Model(load_pretrained(config.model), find_device(config.device), config.precision)
    if model.tokenizer.alphabet != "molecule":
        raise ValueError(f"model={config.model} is of {model.tokenizer.alphabet}s: `generate` makes molecules")
    _ = model.generator  # raises where there is no decoder
    with locked(output.with_name(output.name + ".lock"), 0, lambda problem: problem):
        return _Job(config, model, sampling).run()


class _Job:
    """What is asked for, and how far it has come: after each chunk, on the disk."""

    def __init__(self, config: GenerateConfig, model: Model, sampling: Sampling):
        self.config, self.model, self.sampling, self.output = config, model, sampling, Path(config.output)
        names = ("partial", "rejects.tsv", "partial.json")
        self.partial, self.rejects, self.file = (self.output.with_name(f"{self.output.name}.{n}") for n in names)
        self.settings = {key: value for key, value in asdict(config).items() if key not in ("output", "overwrite")}
        self.settings["weights"] = weights_hash(model.module)
        self.tally = Tally()
        self.done: list[str] = []  # of each chunk that is: what it was made of
        self.sizes = 0, 0
        state = read_json(self.file) if self.file.exists() else None
        if state is not None and state["settings"] != self.settings:
            log.warning("%s was begun with other settings: starting anew", self.partial)
            self.file.unlink()
        elif state is not None:
            self.tally, self.done, self.sizes = Tally(**state["tally"]), state["done"], state["sizes"]
            self.tally.shown = [(seed, [Judged(*j) for j in found]) for seed, found in self.tally.shown]
            log.info("Going on after %d molecules that %s has", self.tally.generated, self.partial)

    def run(self) -> dict[str, Any]:
        config, tally = self.config, self.tally
        with ExitStack() as stack:
            files = []
            for path, size in zip((self.partial, self.rejects), self.sizes, strict=True):
                files.append(stack.enter_context(open(path, "a", encoding="utf-8", errors="replace", newline="")))
                if path.stat().st_size < size:
                    raise ValueError(f"{path} is shorter than {self.file} says: delete that one to start anew")
                os.truncate(path, size)
            table = csv.writer(files[0], lineterminator="\n")
            bad = reject_table(files[1], not self.done)
            judging = stack.enter_context(Judges())
            progress = stack.enter_context(Progress("generate", None))
            reference = _reference(config, judging, self.model.tokenizer)
            known = hashlib.sha256("\n".join(sorted(reference)).encode()).hexdigest()
            if not self.done:
                table.writerow(COLUMNS)
            a_seed = config.num_samples if config.method == INTERPOLATE else self.sampling.copies * self.sampling.kept
            for i, (seeds, bad_ones) in enumerate(_chunks(config, self.model, judging, max(1, CHUNK // a_seed))):
                mark = hashlib.sha256(repr((seeds, known)).encode()).hexdigest()
                if mark in self.done[i : i + 1]:
                    continue
                if i < len(self.done):
                    raise ValueError(f"{self.partial} has another input or reference: delete {self.file} to start anew")
                tally.rejected += len(bad_ones)
                bad.writerows(bad_ones)
                if config.method == INTERPOLATE:
                    groups = _between(self.model, seeds, self.sampling, config.num_samples)
                else:
                    groups = _near(self.model, seeds, self.sampling)
                _write(table, groups, self.sampling, tally, judging, reference)
                self._keep(mark, files)
                progress.update(tally.generated, "molecules")
        return self._end()

    def _keep(self, mark: str, files: list[Any]) -> None:
        """What the files have now is not made again."""
        for file in files:
            file.flush()
            fsync(file.name)
        self.done.append(mark)
        sizes = [os.path.getsize(file.name) for file in files]
        write_json(self.file, dict(settings=self.settings, tally=asdict(self.tally), done=self.done, sizes=sizes))

    def _end(self) -> dict[str, Any]:
        config, tally, output = self.config, self.tally, self.output
        if not tally.generated:
            self.partial.unlink()
            self.file.unlink(missing_ok=True)
            need = "two molecules" if config.method == INTERPOLATE else "one molecule"
            raise ValueError(f"input={config.input} has not {need} that the model can read; see {self.rejects}")
        if not tally.rejected:
            self.rejects.unlink()
        else:
            log.warning("%d records were rejected, see %s", tally.rejected, self.rejects)
        used = {"reference": config.reference or "the input", "scaled_radius": self.sampling.scaled_radius}
        report = {**tally.report(), **self.settings, **used}
        write_json(output.with_suffix(".json"), report)
        draw_grid(output.with_suffix(".png"), tally.shown)
        self.file.unlink()
        os.replace(self.partial, output)
        log.info("%d molecules in %s, a picture in %s", tally.generated, output, output.with_suffix(".png"))
        return report


def _check(config: GenerateConfig) -> Sampling:
    between = config.method == INTERPOLATE
    radius = config.scaled_radius if config.scaled_radius is not None else 0.0 if between else 1.0
    chosen: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(Sampling)}
    fixed = {"method": METHODS[0], "num_samples": 1} if between else {}
    chosen |= {**fixed, "scaled_radius": radius}
    sampling = Sampling(**chosen)
    problems = [problem.replace("there are: ", f"there are: {INTERPOLATE}, ") for problem in sampling.problems()]
    if between and config.num_samples < 1:
        problems.append(f"num_samples={config.num_samples} must be at least 1")
    if Path(config.output).resolve() in [Path(p).resolve() for p in (config.input, config.reference or "")]:
        problems.append(f"output={config.output} is what is read: give the new molecules a file of their own")
    if Path(config.output).suffix != ".csv":
        problems.append(f"output={config.output}: the name must end in .csv")
    if problems:
        raise ValueError("; ".join(problems))
    return sampling


def _reference(config: GenerateConfig, judging: Judges, tokenizer: Tokenizer) -> set[str]:
    """Canonical SMILES of known molecules: the reference's, or those of the input itself."""
    if config.reference is not None and config.reference.endswith(".arrow"):  # a cluster's first is canonical already
        store = Store.open(config.reference)
        first = store.clusters.order[store.clusters.start] if store.clusters is not None else np.arange(len(store))
        return {smiles for part in np.array_split(first, len(first) // 10_000 + 1) for smiles in store.texts(part)}
    columns = (None, None) if config.reference is not None else (config.id_column, config.sequence_column)
    records = read_records(config.reference or config.input, *columns, tokenizer)
    found = [r.sequence.decode("utf-8", "replace").strip() for r in records if not isinstance(r, Reject)]
    return set(judging.each(canonical, found)) - {""}


def _chunks(
    config: GenerateConfig, model: Model, judging: Judges, size: int
) -> Iterator[tuple[list[Seed], list[Reject]]]:
    """Usable records, and rejects. To interpolate, a chunk begins with the last seed before it."""
    limit, number = model.max_residues(), 0
    seeds: list[Seed] = []
    rejects: list[Reject] = []
    kept = 1 if config.method == INTERPOLATE else 0
    for record in judging.check(read_records(config.input, config.id_column, config.sequence_column, model.tokenizer)):
        if isinstance(record, Reject):
            rejects.append(record)
            continue
        smiles = model.tokenizer.clean(record.sequence)[0]
        if (length := len(model.tokenizer.codes(smiles))) > limit:
            rejects.append(Reject(record.source, record.line, record.id, f"{length} tokens, the model reads {limit}"))
            continue
        seeds.append(Seed(number, record.id, smiles.decode()))
        number += 1
        if len(seeds) == size + kept:
            yield seeds, rejects
            seeds, rejects = seeds[len(seeds) - kept :], []
    if len(seeds) > kept or rejects:
        yield seeds, rejects


Group = tuple[str, tuple[str, ...], list[Hypothesis], list[str]]  # id, origins, what was made of them, as text


def _hiddens(model: Model, seeds: list[Seed]) -> list[np.ndarray]:
    """(L, D) fp32 of each; unlike `Model.hiddens` also of molecules with many tokens that the vocabulary lacks."""
    (last,) = model.layer_numbers([-1])
    return model.run([seed.smiles.encode() for seed in seeds], Wanted((last,), None, hiddens=True)).hiddens[last]


def _near(model: Model, seeds: list[Seed], sampling: Sampling) -> Iterator[Group]:
    hiddens = _hiddens(model, seeds)
    found = model.explore(hiddens, sampling, np.array([seed.number for seed in seeds], dtype=np.int64))
    for seed, hypotheses in zip(seeds, found, strict=True):
        yield seed.id, (seed.smiles,), hypotheses, [model.tokenizer.decode(h.ids) for h in hypotheses]


def _between(model: Model, seeds: list[Seed], sampling: Sampling, count: int) -> Iterator[Group]:
    """Each seed and the next one."""
    hiddens = _hiddens(model, seeds)
    for (a, b), (seed, following) in zip(pairwise(hiddens), pairwise(seeds), strict=True):
        numbers = seed.number * 2**20 + np.arange(count)
        found = [h[0] for h in model.explore(interpolate(a, b, count), sampling, numbers)]
        texts = [model.tokenizer.decode(h.ids) for h in found]
        yield f"{seed.id} > {following.id}", (seed.smiles, following.smiles), found, texts


def _write(
    table: Any, groups: Iterator[Group], sampling: Sampling, tally: Tally, judging: Judges, reference: set[str]
) -> None:
    made = list(groups)
    ended = ((h, t, origins) for _, origins, found, texts in made for h, t in zip(found, texts, strict=True))
    pairs = [(text if h.finished else "", origins) for h, text, origins in ended]  # cut off: whatever it is, no answer
    verdicts = iter(judging.each(judge, pairs))
    for name, origins, hypotheses, texts in made:
        judged = [next(verdicts) for _ in texts]
        novel = tally.add(origins, judged, reference)
        for i, (text, hypothesis, j, new) in enumerate(zip(texts, hypotheses, judged, novel, strict=True)):
            valid = j.smiles != ""
            log_p = hypothesis.score * penalty(len(hypothesis.ids) + hypothesis.finished, sampling.decoding)
            numbers = (f"{j.qed:.3f}", f"{j.similarity:.3f}") if valid else ("", "")
            start = (name, ">".join(origins), i, j.smiles or text, int(valid), f"{log_p:.4f}")
            table.writerow((*start, *numbers, int(new)))


@dataclass
class Tally:
    """Counts and sums for the report, and what the picture shows. uniqueness: over `unique` seeds."""

    seeds: int = 0
    generated: int = 0
    rejected: int = 0
    valid: int = 0
    novel: int = 0
    nuv: int = 0
    unique: int = 0
    uniqueness: float = 0.0
    qed: float = 0.0
    similarity: float = 0.0
    shown: list[tuple[str, list[Judged]]] = field(default_factory=list)

    def add(self, origins: tuple[str, ...], judged: list[Judged], reference: set[str]) -> list[bool]:
        """Count what was made of one seed; returns which of it are novel."""
        own = {canonical(smiles) for smiles in origins}
        novel = [bool(j.smiles) and j.smiles not in own and j.smiles not in reference for j in judged]
        valid = [j.smiles for j in judged if j.smiles]
        self.seeds += 1
        self.generated += len(judged)
        self.valid += len(valid)
        self.novel += sum(novel)
        self.nuv += len({j.smiles for j, new in zip(judged, novel, strict=True) if new})
        if valid:
            self.unique += 1
            self.uniqueness += len(set(valid)) / len(valid)
        self.qed += sum(j.qed for j in judged)
        self.similarity += sum(j.similarity for j in judged)
        if len(self.shown) < SEEDS:
            self.shown.append((origins[0], judged))
        return novel

    def report(self) -> dict[str, Any]:
        some = max(self.valid, 1)
        return {
            "seeds": self.seeds,
            "generated": self.generated,
            "validity": self.valid / max(self.generated, 1),
            "uniqueness": self.uniqueness / max(self.unique, 1),
            "novelty": self.novel / some,
            "nuv": self.nuv / max(self.generated, 1),
            "qed": self.qed / some if self.valid else None,
            "similarity": self.similarity / some if self.valid else None,
            "rejected": self.rejected,
        }
