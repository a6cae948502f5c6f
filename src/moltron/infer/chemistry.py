"""What RDKit says of generated molecules: whether they are any, how drug-like, how near to where they came from.

Light to import: worker processes do. Knows nothing of models.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from moltron.common.logging import get_logger
from moltron.data.prepare import molecules

log = get_logger(__name__)
FEW = 500  # molecules that are judged sooner here than in other processes
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
    found = rdkit().MolFromSmiles(smiles) if smiles else None
    return found if found is not None and found.GetNumAtoms() else None


def canonical(smiles: str) -> str:
    found = molecule(smiles)
    return "" if found is None else rdkit().MolToSmiles(found)


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


class Judges(ProcessPoolExecutor):
    """`judge` and `canonical` over many molecules, in order; worker processes come when there is enough to do."""

    def __init__(self) -> None:
        super().__init__(os.cpu_count(), get_context("spawn"))  # a process that has used CUDA must not fork

    def each(self, function: Any, items: Sequence[Any]) -> Iterable[Any]:
        return map(function, items) if len(items) < FEW else self.map(function, items, chunksize=100)


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
