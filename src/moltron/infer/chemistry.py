"""What RDKit says of molecules: whether they are any, how drug-like, how near to where they came from.

Light to import: worker processes do. Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cached_property, lru_cache
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from moltron.common.logging import get_logger
from moltron.data.prepare import molecules
from moltron.data.readers import Record, Reject

log = get_logger(__name__)
FEW = 500  # molecules that are judged sooner here than in other processes
BATCH = 10_000  # records that are checked together
COLUMNS, SEEDS = 6, 8  # of the picture: samples beside each seed, seeds


class Judged(NamedTuple):
    """smiles: canonical, "" where RDKit reads no molecule; qed: Bickerton et al. 2012, 0 … 1; similarity: Tanimoto, of
    Morgan fingerprints (radius 2, 2,048 bits), to the nearer of the molecules it came from."""

    smiles: str
    qed: float
    similarity: float


@lru_cache(maxsize=1)
def rdkit() -> Any:
    """RDKit's Chem, quiet, with what is used of it here. Raises ValueError where it is not installed."""
    chem, _, _ = molecules.rdkit()
    from rdkit.Chem import QED, rdFingerprintGenerator  # noqa: F401

    return chem


def molecule(smiles: str) -> Any:
    """An RDKit molecule with atoms, or None."""
    return molecules.read_smiles(smiles.encode())[0]


def canonical(smiles: str) -> str:
    return "" if (found := molecule(smiles)) is None else rdkit().MolToSmiles(found)


def check(record: Record | Reject) -> Record | Reject:
    """The same, or a Reject in place of a molecule that no model can read."""
    reason = molecules.problem(record.sequence) if isinstance(record, Record) else None
    return record if reason is None else Reject(record.source, record.line, record.id, reason)


@lru_cache(maxsize=1)
def _fingerprints() -> Any:
    return rdkit().rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)


@lru_cache(maxsize=4096)
def _fingerprint(smiles: str) -> Any:
    return _fingerprints().GetFingerprint(molecule(smiles))


def judge(pair: tuple[str, tuple[str, ...]]) -> Judged:
    """pair: a generated SMILES, and the valid SMILES it came from."""
    smiles, origins = pair
    found = molecule(smiles)
    if found is None:
        return Judged("", 0.0, 0.0)
    own = _fingerprints().GetFingerprint(found)
    similarity = max(rdkit().DataStructs.TanimotoSimilarity(own, _fingerprint(origin)) for origin in origins)
    return Judged(rdkit().MolToSmiles(found), rdkit().QED.qed(found), similarity)


class Judges(ExitStack):
    """`check`, `judge` and `canonical` over many molecules, in order; worker processes come when there is enough to do,
    one for each core, which the ranks of a machine share."""

    @cached_property
    def workers(self) -> ProcessPoolExecutor:
        number = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        context = get_context("spawn")  # a process that has used CUDA must not fork
        pool = ProcessPoolExecutor(number, context, molecules.start_worker)
        self.callback(pool.shutdown, cancel_futures=True)  # Ctrl-C is this process's affair
        return pool

    def each(self, function: Any, items: Sequence[Any]) -> Iterable[Any]:
        return map(function, items) if len(items) < FEW else self.workers.map(function, items, chunksize=100)

    def check(self, records: Iterator[Record | Reject]) -> Iterator[Record | Reject]:
        while some := list(islice(records, BATCH)):
            yield from self.each(check, some)


def draw_grid(path: Path, rows: Sequence[tuple[str, Sequence[Judged]]]) -> None:
    """A row a seed: the seed, then different molecules made of it, with their drug-likeness and similarity.

    Without a picture where RDKit lacks the system's libraries for drawing, and says so.
    """
    try:  # only here: slim containers lack what it links to, and training with metrics on molecules needs none of it
        from rdkit.Chem import Draw
    except ImportError as error:
        log.warning("no picture %s: %s (on Debian: apt install libxrender1 libxext6)", path, error)
        return
    drawn, legends = [], []
    for seed, found in rows[:SEEDS]:
        distinct = list({j.smiles: j for j in found if j.smiles}.values())[:COLUMNS]
        drawn += [molecule(seed), *(molecule(j.smiles) for j in distinct), *[None] * (COLUMNS - len(distinct))]
        legends += ["seed", *(f"QED {j.qed:.2f}, similarity {j.similarity:.2f}" for j in distinct)]
        legends += [""] * (COLUMNS - len(distinct))
    image = Draw.MolsToGridImage(drawn, molsPerRow=1 + COLUMNS, subImgSize=(260, 200), legends=legends)
    image.save(path)
