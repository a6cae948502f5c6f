"""Validation loss during training: all records of the split, in order, under masks that never change.

    store ──BatchPlan.evaluation, masks of seed 0──> packs, shared out over ranks ──model──> Σ loss / Σ targets

Every rank runs equally many packs (empty ones at the end), since FSDP's ranks gather weights together. Knows nothing of
training.
"""

from __future__ import annotations

import torch
from torch import nn

from moltron.config.schema import ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import EVALUATION_SEED, BatchPlan
from moltron.data.store import Store
from moltron.objectives import get_objective
from moltron.parallel.collectives import all_reduce_sum, rank, world_size
from moltron.tokenizers import ResidueTokenizer


class Evaluator:
    """The loss of a model on one split; the same number for any number of ranks, to rounding."""

    def __init__(
        self,
        store: Store,
        tokenizer: ResidueTokenizer,
        objective: ObjectiveConfig,
        device: torch.device,
        *,
        tokens: int,
        max_length: int,
        packs: int | None = None,
    ):
        """tokens: T of a pack. packs: only so many, from the beginning of the split; None: all."""
        self.store, self.tokenizer, self.device, self.packs = store, tokenizer, device, packs
        self.objective = get_objective(objective, tokenizer, EVALUATION_SEED)
        self.plan = BatchPlan.evaluation(store, tokens, max_length, tokenizer.num_specials)

    def loss(self, model: nn.Module) -> float:
        """Nats a target, over all ranks; nan where the split has no target."""
        loader = BatchLoader(
            self.plan,
            self.store,
            self.tokenizer,
            self.objective,
            packs=world_size(),
            rank=rank(),
            world=world_size(),
            epochs=1,
            pin=self.device.type == "cuda",
        )
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for index, step in enumerate(loader):
                first = index * world_size()
                if self.packs is not None and first >= self.packs:
                    break
                (batch,) = (b.to(self.device, non_blocking=True) for b in step.batches)
                loss_sum, count = self.objective.loss(model(batch), batch)
                if self.packs is None or first + rank() < self.packs:
                    totals += torch.stack((loss_sum.double(), count.double()))
        model.train(was_training)
        loss_sum, count = all_reduce_sum(totals).tolist()
        return loss_sum / count if count else float("nan")
