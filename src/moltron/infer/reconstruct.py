"""Does the decoder write what the encoder read? Held-out molecules, unmasked, decoded greedily and compared.

    store ──canonical SMILES, nothing masked──> packs, shared out over ranks ──encode──> memory ──Generator──> ids
                                                                                     ids against those read ──> shares

For a model in training on any number of ranks, and for `moltron evaluate`. Ranks decode in step, since FSDP's gather
weights together: none ends before all have. Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from moltron.common.watchdog import doing
from moltron.config.schema import ObjectiveConfig
from moltron.data.loader import BatchLoader
from moltron.data.plan import EVALUATION_SEED, BatchPlan
from moltron.data.store import Store
from moltron.infer.chemistry import molecule, rdkit
from moltron.infer.generate import Decoding, Generator, Hypothesis
from moltron.models.batch import PackedBatch
from moltron.objectives import Limits, get_objective
from moltron.parallel.collectives import all_reduce_max, all_reduce_sum, data_rank, data_world_size
from moltron.tokenizers import Tokenizer


class Reconstruction:
    """tokens: T of the packs, those of evaluation, for which the model is compiled. molecules: at least so many are
    decoded, in whole packs; all where the store has fewer. Raises ValueError without RDKit."""

    def __init__(
        self,
        store: Store,
        tokenizer: Tokenizer,
        objective: ObjectiveConfig,
        device: torch.device,
        *,
        tokens: int,
        limits: Limits,
        molecules: int,
    ):
        rdkit()  # or an error: now, not after the first thousand steps
        self.tokenizer, self.device, self.molecules = tokenizer, device, molecules
        whole = replace(objective, mask_prob=0.0, encoder_smiles="canonical", decoder_smiles="same")
        whole_objective = get_objective(whole, tokenizer, EVALUATION_SEED)
        plan = BatchPlan.evaluation(store, whole_objective, (tokens, 2 * tokens), limits)
        self.decoding = Decoding(max_tokens=limits.decoder)
        world = data_world_size()
        self.loader = BatchLoader(plan, store, tokenizer, world, data_rank(), world, epochs=1)

    @torch.no_grad()
    def shares(self, model: nn.Module) -> dict[str, float]:
        """token_accuracy: of the true tokens, the end included, those that stand in their place. exact_accuracy: of
        the molecules, those of which every token does. invalid: those that never end or are none to RDKit."""
        was_training = model.training
        model.eval()
        generator = Generator(
            model,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
            capacity=self.decoding.max_tokens or 1,
            device=self.device,
            still=self._any_rank,
        )
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        for step in self.loader:
            doing("decoding")
            batch = step.batches[0].to(self.device)
            memory_TD = model.encode(batch)  # type: ignore[operator]
            keys = np.arange(max(1, batch.num_sequences))  # without molecules, a filler keeps step with the other ranks
            found = generator.decode_packed(memory_TD, batch.layout, keys, self.decoding)
            compared = [self._compare(got[0], true) for got, true in zip(found, _true_ids(batch))]
            here = np.array(compared, dtype=np.float64).reshape(-1, len(sums)).sum(0)
            sums += all_reduce_sum(torch.from_numpy(here).to(self.device))
            if sums[4] >= self.molecules:
                break
        model.train(was_training)
        right, tokens, exact, invalid, count = sums.tolist()
        return {
            "token_accuracy": right / max(tokens, 1),
            "exact_accuracy": exact / max(count, 1),
            "invalid": invalid / max(count, 1),
        }

    def _compare(self, got: Hypothesis, true: np.ndarray) -> tuple[float, ...]:
        """Tokens right, tokens, exact, invalid, molecules."""
        common = min(len(got.ids), len(true))
        is_end_right = got.finished and len(got.ids) == len(true)
        right = int((got.ids[:common] == true[:common]).sum()) + is_end_right
        exact = right == len(true) + 1
        invalid = not got.finished or molecule(self.tokenizer.decode(got.ids)) is None
        return right, len(true) + 1, exact, invalid, 1

    def _any_rank(self, running: bool) -> bool:
        return bool(all_reduce_max(torch.tensor(float(running), device=self.device)).item())


def _true_ids(batch: PackedBatch) -> Iterator[np.ndarray]:
    """What the decoder is to write for each sequence, without the end: what it reads, without the beginning."""
    assert batch.decoder_ids is not None and batch.decoder_layout is not None
    ids, bounds = batch.decoder_ids.cpu().numpy(), batch.decoder_layout.cu_seqlens.tolist()
    for i in range(batch.num_sequences):
        yield ids[bounds[i] + 1 : bounds[i + 1]]
