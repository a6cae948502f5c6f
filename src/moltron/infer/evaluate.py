"""Loss and perplexity of a masked language model on records it has not seen.

    FASTA | CSV ──clean──> records in memory ─┐
    DIR/val.arrow ──────────Store─────────────┴─ plan ── masks f(seed 0, index) ── model ── Σ loss / Σ targets

Masks, crops and packing are the trainer's own (`BatchPlan.evaluation`, `MaskedLM`), so a run's val_loss and this agree.

N records, L residues
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moltron.checkpoint.weights import load_pretrained
from moltron.common.logging import get_logger
from moltron.config.schema import EvaluateConfig, ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import EVALUATION_SEED, BatchPlan
from moltron.data.readers import Reject, read_records
from moltron.data.store import Store
from moltron.infer.api import Model
from moltron.models.batch import PackedBatch
from moltron.objectives import get_objective
from moltron.parallel import collectives
from moltron.tokenizers.residues import clean

log = get_logger(__name__)


@torch.no_grad()
def evaluate_batches(model: nn.Module, batches: Iterable[PackedBatch], objective: Any) -> tuple[Tensor, Tensor]:
    """(Σ loss, targets) over corrupted batches of this rank, fp64 on the model's device; nothing waits for it."""
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    training = model.training
    model.eval()
    for batch in batches:
        batch = batch.to(device, non_blocking=True)
        loss, count = objective.loss(model(batch), batch)
        totals += torch.stack([loss.double(), count.double()])
    model.train(training)
    return totals[0], totals[1]


def evaluate_file(config: EvaluateConfig) -> dict[str, float | int]:
    """{"loss": nats a target, "perplexity", "targets", "sequences"} of a file. Under torchrun the ranks share the work.

    Records longer than `max_length` are cropped as in training. Raises ValueError where a record is broken.
    """
    device = collectives.init(config.device)
    model = Model(load_pretrained(config.model), device, config.precision, config.tokens)
    tokenizer = model.tokenizer
    max_length = model.max_residues(config.max_length) + tokenizer.num_specials
    store: Any = Store.open(config.input) if config.input.endswith(".arrow") else _read(config)
    tokens = max(model.encoder.tokens, max_length)
    plan = BatchPlan.evaluation(store, tokens, max_length, tokenizer.num_specials)
    objective = get_objective(ObjectiveConfig(name=model.spec.objectives[0]), tokenizer, EVALUATION_SEED)
    rank, world = collectives.rank(), collectives.world_size()
    loader = BatchLoader(
        plan, store, tokenizer, objective, packs=world, rank=rank, world=world, epochs=1, pin=device.type == "cuda"
    )
    batches = (batch for step in loader for batch in step.batches)
    totals = torch.stack(evaluate_batches(model.module, batches, objective))
    loss_sum, targets = collectives.all_reduce_sum(totals).tolist()
    if not targets:
        raise ValueError(f"input={config.input} has no residues to predict")
    loss = loss_sum / targets
    return {"loss": loss, "perplexity": math.exp(loss), "targets": int(targets), "sequences": len(store)}


class _Memory:
    """Records of a file in the form of a `Store`: what the plan and the loader read of one."""

    clusters = None
    fingerprint = ""

    def __init__(self, ids: list[str], sequences: list[bytes]):
        self._ids = ids
        self._letters = np.frombuffer(b"".join(sequences), dtype=np.uint8)
        self.lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, rows: Iterable[int]) -> list[str]:
        return [self._ids[row] for row in rows]

    def gather(self, rows: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """(Σ lengths,) letters: lengths[i] of record rows[i] from starts[i] on."""
        begins = self._starts[rows] + starts
        shifts = np.repeat(begins - (np.cumsum(lengths) - lengths), lengths)
        return self._letters[np.arange(len(shifts)) + shifts]


def _read(config: EvaluateConfig) -> _Memory:
    ids, sequences, letters = [], [], 0
    for record in read_records(config.input, config.id_column, config.sequence_column):
        if isinstance(record, Reject):
            raise ValueError(f"{record.source}, line {record.line}, record {record.id!r}: {record.reason}")
        sequence, counts = clean(record.sequence)
        if not sequence:
            raise ValueError(f"{record.source}, line {record.line}, record {record.id!r}: no residues")
        letters += counts.total()
        ids.append(record.id)
        sequences.append(sequence)
    if letters:
        log.warning("%d odd letters were mended by the rule of moltron.tokenizers.clean", letters)
    return _Memory(ids, sequences)
