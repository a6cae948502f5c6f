"""Molecules by RDKit, over all cores: canonical SMILES in pass 1, randomised variants and tokens in pass 2.

    SMILES ──canonicalize──> Canonical                    id, canonical SMILES ──write_rows──> 1 + K rows with tokens
                 both in chunks: Workers.map ──process, process, …──> results in the order of the chunks

What comes out is a function of (settings, seed, id, SMILES), never of the number of processes; a few chunks a process
are in memory. Knows nothing of files.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import parent_process
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa

from moltron.common import rng
from moltron.config.schema import PrepareConfig
from moltron.data.prepare.keys import keys_of
from moltron.tokenizers import get_tokenizer

TOKENIZER = "megamolbart"
LONGEST = 127  # tokens, where max_length does not say: a decoder of 128 positions reads `^` before them
CHUNK = 256  # molecules a task: a fifth of a second
ROWS = pa.schema([("id", pa.string()), ("sequence", pa.string()), ("tokens", pa.binary())])
Kept = TypeVar("Kept")
Argument = TypeVar("Argument")
Result = TypeVar("Result")


def rdkit() -> tuple[Any, Any, Any]:
    """RDKit's Chem, Descriptors and Crippen, without its messages: they have no line numbers, ours do.

    Raises: ValueError where it is not installed.
    """
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem import Crippen, Descriptors
    except ImportError as error:
        raise ValueError("kind=molecule needs RDKit: pip install 'moltron[molecules]'") from error
    rdBase.DisableLog("rdApp.*")
    return Chem, Descriptors, Crippen


# ---------------------------------------------------------------------------------------------------------- in a worker


def not_smiles(text: bytes) -> str | None:
    """What is wrong with it; None: it may be one. RDKit reads CC from `CC O` and takes the rest for a name."""
    if not text.isascii():
        return "a SMILES is ASCII, this one is not"
    return "white space inside the SMILES" if len(text.split()) > 1 else None


def read_smiles(text: bytes) -> tuple[Any, str]:
    """An RDKit molecule with atoms; or None, and why."""
    if found := not_smiles(text):
        return None, found
    try:
        molecule = rdkit()[0].MolFromSmiles(text.strip().decode())
    except RuntimeError:  # an invariant of RDKit; one molecule of a billion must not stop the rest
        molecule = None
    if molecule is None:
        return None, "RDKit cannot read this SMILES"
    return (molecule, "") if molecule.GetNumAtoms() else (None, "a molecule without atoms")


def problem(smiles: bytes) -> str | None:
    """Why a model of molecules cannot read a SMILES, as a file has it; None: it can."""
    if found := read_smiles(smiles)[1]:
        return found
    codes = get_tokenizer(TOKENIZER).codes(smiles.strip())
    return None if any(codes) else "none of its tokens is in the vocabulary"


class Canonical(NamedTuple):
    smiles: bytes
    length: int  # tokens
    problem: str | None  # why it cannot be used
    changes: dict[str, int]  # what was counted on the way


def canonicalize(molecules: list[bytes], config: PrepareConfig) -> list[Canonical]:
    Chem, Descriptors, Crippen = rdkit()
    codes = get_tokenizer(TOKENIZER).codes

    def size(part: Any) -> tuple[int, float, str]:
        return part.GetNumHeavyAtoms(), Descriptors.MolWt(part), Chem.MolToSmiles(part)

    def one(smiles: bytes) -> Canonical:
        changes: dict[str, int] = {}
        molecule, problem = read_smiles(smiles)
        if problem:
            return Canonical(b"", 0, problem, changes)
        if config.salts == "strip" and b"." in smiles:
            parts = Chem.GetMolFrags(molecule, asMols=True)
            if len(parts) > 1:
                molecule, changes["salts_stripped"] = max(parts, key=size), 1
        if config.max_weight is not None and Descriptors.MolWt(molecule) > config.max_weight:
            return Canonical(b"", 0, f"heavier than max_weight={config.max_weight:g}", {})
        if config.max_logp is not None and Crippen.MolLogP(molecule) > config.max_logp:
            return Canonical(b"", 0, f"logP above max_logp={config.max_logp:g}", {})
        canonical = Chem.MolToSmiles(molecule).encode()
        tokens = codes(canonical)
        if unknown := tokens.count(0):
            changes["unknown_tokens"] = unknown
        problem = "none of its tokens is in the vocabulary" if unknown == len(tokens) else None
        return Canonical(canonical, len(tokens), problem, changes)

    def safe(smiles: bytes) -> Canonical:
        try:
            return one(smiles)
        except (RuntimeError, ValueError) as error:  # an invariant of RDKit; one molecule of a billion must not stop it
            return Canonical(b"", 0, f"RDKit fails on this molecule ({type(error).__name__})", {})

    return [safe(smiles) for smiles in molecules]


def write_rows(molecules: pa.RecordBatch, config: PrepareConfig) -> tuple[pa.RecordBatch, dict[str, int]]:
    """molecules: id, canonical SMILES -> ROWS, each molecule as written and then its variants; what was counted."""
    Chem, _, _ = rdkit()
    codes = get_tokenizer(TOKENIZER).codes
    count, longest = config.variants, config.max_length or LONGEST
    ids: list[str] = molecules.column(0).to_pylist()
    states = rng.hash_u64(config.seed, rng.VARIANT, keys_of(ids)[:, None], np.arange(count))
    seeds = (1 + rng.bounded(states, 2**31 - 2)).tolist()  # RDKit takes 1 … 2³¹-1, 0 is no seed
    sequences: list[str] = []
    tokens: list[bytes] = []
    counts: Counter[str] = Counter()
    for canonical, draws in zip(molecules.column(1).to_pylist(), seeds):
        sequences.append(canonical)
        tokens.append(whole := codes(canonical.encode()))
        molecule = Chem.MolFromSmiles(canonical) if count else None
        for draw in draws:
            try:
                text = Chem.MolToRandomSmilesVect(molecule, 1, randomSeed=draw)[0]
                read = codes(text.encode())
            except Exception:  # Boost.Python's ArgumentError too, where RDKit cannot read what it wrote
                text, read = canonical, whole
                counts["variants_failed"] += 1
            if len(read) > longest:
                text, read = canonical, whole
                counts["variants_too_long"] += 1
            sequences.append(text)
            tokens.append(read)
    repeated = [name for name in ids for _ in range(count + 1)]
    return pa.record_batch([repeated, sequences, tokens], schema=ROWS), dict(counts)


def start_worker() -> None:
    """Ctrl-C is the parent's affair; a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


# --------------------------------------------------------------------------------------------------------- many workers


class Workers:
    """Processes that are started when first used. number: None: one for each core this process may use."""

    def __init__(self, number: int | None) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.number = number or cores
        self._pool: ProcessPoolExecutor | None = None

    def map(
        self, function: Callable[[Argument, PrepareConfig], Result], tasks: Iterable[tuple[Kept, Argument]], config: Any
    ) -> Iterator[tuple[Kept, Result]]:
        """(kept, function(argument, config)) of each (kept, argument), in order; `kept` stays in this process.

        Raises: ValueError where a worker was killed.
        """
        rdkit()  # before the processes start, which then share it
        if self.number == 1:
            for kept, argument in tasks:
                yield kept, function(argument, config)
            return
        self._pool = self._pool or ProcessPoolExecutor(self.number, initializer=start_worker)
        waiting: deque[tuple[Kept, Future[Result]]] = deque()
        tasks = iter(tasks)
        try:
            while True:
                for kept, argument in islice(tasks, 3 * self.number - len(waiting)):
                    waiting.append((kept, self._pool.submit(function, argument, config)))
                if not waiting:
                    return
                kept, future = waiting.popleft()
                yield kept, future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                f"one of {self.number} worker processes was killed, perhaps for want of memory: set fewer workers"
            ) from error

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
