"""Loss of a model's objective on records it has not seen: a run's validation split, or any file.

    FASTA | CSV ──clean──> temporary Store ─┐   plan, masks of seed 0
    DIR/val.arrow ─────────Store────────────┴──> packs, shared out over ranks ──model──> Σ loss / Σ targets

Masks, crops and packing are the trainer's own (`BatchPlan.evaluation`, the objective), so a run's val_loss and
`moltron evaluate` agree. Every rank runs equally many packs (empty ones at the end), since FSDP's ranks gather weights
together.
"""

from __future__ import annotations

import math
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moltron.checkpoint.weights import load_pretrained
from moltron.common.logging import get_logger
from moltron.common.watchdog import doing
from moltron.config.schema import EvaluateConfig, ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import EVALUATION_SEED, BatchPlan
from moltron.data.readers import Reject, read_records
from moltron.data.store import Store, StoreWriter
from moltron.infer.api import Model
from moltron.infer.chemistry import Judges
from moltron.infer.reconstruct import Reconstruction
from moltron.objectives import Limits, get_objective
from moltron.parallel.collectives import DEVICES, all_reduce_sum, data_rank, data_world_size, init
from moltron.tokenizers import Tokenizer

log = get_logger(__name__)


class Evaluator:
    """The loss of a model on one split; the same number for any number of ranks, to rounding."""

    def __init__(
        self,
        store: Store,
        tokenizer: Tokenizer,
        objective: ObjectiveConfig,
        device: torch.device,
        *,
        tokens: tuple[int, ...],
        limits: Limits,
        packs: int | None = None,
        molecules: int = 0,
    ):
        """tokens: T, or (T, U), of a pack. packs: only so many, from the beginning of the split; None: all.

        molecules: how many are also decoded, where the objective reconstructs what it reads.
        """
        self.device, self.packs = device, sys.maxsize if packs is None else packs
        self.objective = get_objective(objective, tokenizer, EVALUATION_SEED)
        plan = BatchPlan.evaluation(store, self.objective, tokens, limits)
        world, pin = data_world_size(), device.type == "cuda"
        self.loader = BatchLoader(plan, store, tokenizer, packs=world, rank=data_rank(), world=world, epochs=1, pin=pin)
        self.reconstruction = None
        if molecules and self.objective.reconstructs:
            settings: Any = dict(tokens=tokens[0], limits=limits, molecules=molecules)
            self.reconstruction = Reconstruction(store, tokenizer, objective, device, **settings)

    @torch.no_grad()
    def sums(self, model: nn.Module) -> tuple[float, int]:
        """(Σ loss in nats, targets) over all ranks; nothing waits for the device before the end."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        was_training = model.training
        model.eval()
        steps = -(-self.packs // data_world_size())
        for index, step in enumerate(islice(self.loader, steps)):
            doing("evaluating")
            batch = step.batches[0].to(self.device, non_blocking=True)
            loss, count = self.objective.loss(model(batch), batch)
            if index * data_world_size() + data_rank() < self.packs:
                totals += torch.stack((loss.double(), count.double()))
        model.train(was_training)
        loss_sum, targets = all_reduce_sum(totals).tolist()
        return loss_sum, int(targets)

    def loss(self, model: nn.Module) -> float:
        """Nats a target; nan where the split has no target."""
        loss_sum, targets = self.sums(model)
        return loss_sum / targets if targets else math.nan

    def generated(self, model: nn.Module) -> dict[str, float]:
        """What `Reconstruction.shares` says; nothing where nothing is decoded."""
        return {} if self.reconstruction is None else self.reconstruction.shares(model)


def evaluate_file(config: EvaluateConfig) -> dict[str, float | int]:
    """{"loss": nats a target, "perplexity", "targets", "sequences"} of a file, and of molecules what `Reconstruction`
    says of the first `config.molecules`. Under torchrun the ranks share the work.

    Records longer than `max_length` are cropped as in training (molecules are an error). Raises ValueError for settings
    that cannot work, and at the first record that is broken.
    """
    _check(config)
    device = init(config.device)
    model = Model(load_pretrained(config.model), device, config.precision, config.tokens)
    max_length = model.max_residues(config.max_length) + model.tokenizer.num_specials
    settings, known = config.objective, model.spec.objectives
    if settings.name == "auto":
        settings = replace(settings, name=known[0])
    if settings.name not in known:
        raise ValueError(f"objective.name={settings.name} does not suit {model.spec.name}: choose {', '.join(known)}")
    tokens, limits = max(model.encoder.tokens, max_length), Limits(max_length, max_length)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "records.arrow")
        path = config.input if config.input.endswith(".arrow") else _write_store(config, model.tokenizer, file)
        store = Store.open(path, config.cache_dir)
        if store.alphabet != model.tokenizer.alphabet:
            raise ValueError(f"{path} holds {store.alphabet}s, the model reads {model.tokenizer.alphabet}s")
        objective = get_objective(settings, model.tokenizer, EVALUATION_SEED)
        if not objective.crops and store.lengths.max(initial=0) > (room := objective.max_residues(limits)):
            (longest,) = store.ids([int(store.lengths.argmax())])
            raise ValueError(
                f"input={config.input}: record {longest!r} has {store.lengths.max()} tokens, the model reads {room}, "
                "and molecules are not cropped: leave such records out, as `moltron prepare` does"
            )
        sizes: Any = dict(tokens=(tokens, tokens), limits=limits, molecules=config.molecules)
        evaluator = Evaluator(store, model.tokenizer, settings, device, **sizes)
        loss_sum, targets = evaluator.sums(model.module)
        shares = evaluator.generated(model.module) if targets else {}
        count = evaluator.loader.plan.num_items
    if not targets:
        raise ValueError(f"input={config.input} has no residues to predict")
    loss = loss_sum / targets
    return {"loss": loss, "perplexity": math.exp(loss), "targets": targets, "sequences": count} | shares


def _check(config: EvaluateConfig) -> None:
    problems = []
    if config.device not in DEVICES:
        problems.append(f"device={config.device} is unknown; there are: {', '.join(DEVICES)}")
    if config.tokens is not None and config.tokens < 1:
        problems.append(f"tokens={config.tokens} must be at least 1")
    if config.molecules < 0:
        problems.append(f"molecules={config.molecules} must not be negative")
    if problems:
        raise ValueError("; ".join(problems))


def _write_store(config: EvaluateConfig, tokenizer: Tokenizer, path: Path) -> Path:
    """All records of a FASTA, CSV or SMILES file, cleaned."""
    records = read_records(config.input, config.id_column, config.sequence_column, tokenizer)
    is_molecule, odd = tokenizer.alphabet == "molecule", 0
    with StoreWriter(path, tokenizer.alphabet, tokens=is_molecule) as writer, Judges() as judging:
        records = judging.check(records) if is_molecule else records
        while some := list(islice(records, 10_000)):
            ids, sequences = [], []
            for record in some:
                sequence, letters = (b"", {}) if isinstance(record, Reject) else tokenizer.clean(record.sequence)
                if not sequence:
                    reason = record.reason if isinstance(record, Reject) else "no residues"
                    raise ValueError(f"{record.source}, line {record.line}, record {record.id!r}: {reason}")
                odd += sum(letters.values())
                ids.append(record.id)
                sequences.append(sequence)
            writer.add(ids, sequences, [tokenizer.codes(s) for s in sequences] if is_molecule else None)
    if odd:
        log.warning("%d odd letters were mended by the rule of moltron.tokenizers.clean", odd)
    return path
