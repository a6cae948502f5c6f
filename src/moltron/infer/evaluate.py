"""Loss of a masked language model on records it has not seen: a run's validation split, or any file.

    FASTA | CSV ──clean──> temporary Store ─┐   plan, masks of seed 0
    DIR/val.arrow ─────────Store────────────┴──> packs, shared out over ranks ──model──> Σ loss / Σ targets

Masks, crops and packing are the trainer's own (`BatchPlan.evaluation`, `MaskedLM`), so a run's val_loss and
`moltron evaluate` agree. Every rank runs equally many packs (empty ones at the end), since FSDP's ranks gather weights
together.
"""

from __future__ import annotations

import math
import sys
import tempfile
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from moltron.checkpoint.weights import load_pretrained
from moltron.common.logging import get_logger
from moltron.config.schema import EvaluateConfig, ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import EVALUATION_SEED, BatchPlan
from moltron.data.readers import Reject, read_records
from moltron.data.store import Store, StoreWriter
from moltron.infer.api import Model
from moltron.objectives import get_objective
from moltron.parallel.collectives import all_reduce_sum, init, rank, world_size
from moltron.tokenizers import Tokenizer, clean

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
        tokens: int,
        max_length: int,
        packs: int | None = None,
    ):
        """tokens: T of a pack. packs: only so many, from the beginning of the split; None: all."""
        self.device, self.packs = device, sys.maxsize if packs is None else packs
        self.objective = get_objective(objective, tokenizer, EVALUATION_SEED)
        plan = BatchPlan.evaluation(store, tokens, max_length, tokenizer.num_specials)
        world, pin = world_size(), device.type == "cuda"
        self.loader = BatchLoader(
            plan, store, tokenizer, self.objective, packs=world, rank=rank(), world=world, epochs=1, pin=pin
        )

    @torch.no_grad()
    def sums(self, model: nn.Module) -> tuple[float, int]:
        """(Σ loss in nats, targets) over all ranks; nothing waits for the device before the end."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        was_training = model.training
        model.eval()
        steps = -(-self.packs // world_size())
        for index, step in enumerate(islice(self.loader, steps)):
            batch = step.batches[0].to(self.device, non_blocking=True)
            loss, count = self.objective.loss(model(batch), batch)
            if index * world_size() + rank() < self.packs:
                totals += torch.stack((loss.double(), count.double()))
        model.train(was_training)
        loss_sum, targets = all_reduce_sum(totals).tolist()
        return loss_sum, int(targets)

    def loss(self, model: nn.Module) -> float:
        """Nats a target; nan where the split has no target."""
        loss_sum, targets = self.sums(model)
        return loss_sum / targets if targets else math.nan


def evaluate_file(config: EvaluateConfig) -> dict[str, float | int]:
    """{"loss": nats a target, "perplexity", "targets", "sequences"} of a file. Under torchrun the ranks share the work.

    Records longer than `max_length` are cropped as in training. Raises ValueError where a record is broken.
    """
    device = init(config.device)
    model = Model(load_pretrained(config.model), device, config.precision, config.tokens)
    max_length = model.max_residues(config.max_length) + model.tokenizer.num_specials
    tokens = max(model.encoder.tokens, max_length)
    objective = ObjectiveConfig(name=model.spec.objectives[0])
    with tempfile.TemporaryDirectory() as folder:
        path = config.input if config.input.endswith(".arrow") else _write_store(config, Path(folder, "records.arrow"))
        store = Store.open(path)
        evaluator = Evaluator(store, model.tokenizer, objective, device, tokens=tokens, max_length=max_length)
        loss_sum, targets = evaluator.sums(model.module)
    if not targets:
        raise ValueError(f"input={config.input} has no residues to predict")
    loss = loss_sum / targets
    return {"loss": loss, "perplexity": math.exp(loss), "targets": targets, "sequences": len(store)}


def _write_store(config: EvaluateConfig, path: Path) -> Path:
    """All records of a FASTA or CSV file, cleaned."""
    ids, sequences, odd = [], [], 0
    with StoreWriter(path) as writer:
        for record in read_records(config.input, config.id_column, config.sequence_column):
            sequence, letters = (b"", {}) if isinstance(record, Reject) else clean(record.sequence)
            if not sequence:
                reason = record.reason if isinstance(record, Reject) else "no residues"
                raise ValueError(f"{record.source}, line {record.line}, record {record.id!r}: {reason}")
            odd += sum(letters.values())
            ids.append(record.id)
            sequences.append(sequence)
            if len(ids) == 10_000:
                writer.add(ids, sequences)
                ids, sequences = [], []
        writer.add(ids, sequences)
    if odd:
        log.warning("%d odd letters were mended by the rule of moltron.tokenizers.clean", odd)
    return path
