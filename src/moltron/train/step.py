"""One optimizer step, and what is known of it, a step later.

    micro-batches ──count over all ranks──> forward, loss / count, backward … ──> norm, clip ──> optimizer
                                                                    └──copy to the host, read one step late──> Reading

On CUDA nothing in here waits for the device, but in fp16 and with train.nonfinite=skip, where the gradient's norm
decides whether there is an update. Losses are (sum, count): the one division by the global count is here, and here
FSDP's average over ranks is undone. Knows nothing of epochs, files or schedules.

P packs of this rank, T tokens a pack
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moltron.models.batch import PackedBatch
from moltron.parallel.apply import set_gradient_sync, total_norm
from moltron.parallel.collectives import all_reduce_sum, data_world_size
from moltron.parallel.graphs import Graphed
from moltron.parallel.pipeline import pipeline_of
from moltron.train.optim import Optimizer

# Of a step, over all ranks: tokens of the encoder, or of the one stream there is, without and with filler, and so on
COUNTS = ("tokens", "padded_tokens", "decoder_tokens", "padded_decoder_tokens")
GLOBAL = ("loss", "targets", *COUNTS, "flops", "stop", "grad_norm")


class NonFiniteError(ValueError):
    """A loss or gradient that is not finite, where the run is told to stop at one."""


@dataclass
class LossScaler:
    """fp16's dynamic loss scale: halved when gradients overflow, doubled after `interval` good updates in a row."""

    scale: float = 2.0**16
    good: int = 0
    interval: int = 2000
    lowest: float = 1.0

    def update(self, finite: bool) -> None:
        if not finite:
            self.scale, self.good = max(self.scale / 2, self.lowest), 0
            return
        self.good += 1
        if self.good == self.interval:
            self.scale, self.good = self.scale * 2, 0


@dataclass
class Reading:
    """A finished step, in plain numbers. loss: mean over all targets of all ranks. packs: this rank's loss sums.

    counts: COUNTS of all ranks.
    seconds: from the end of the step before to the end of this one, by the GPU's own clock; None: it has just ended.
    """

    step: int
    lr: float
    loss: float
    grad_norm: float
    counts: dict[str, int]
    flops: float
    stop: bool
    skipped: bool
    packs: list[float]
    records: list[np.ndarray]
    seconds: float | None

    @property
    def tokens(self) -> int:
        return self.counts["tokens"]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass
class Pending:
    """A step that the device may still be working on."""

    step: int
    lr: float
    values: Tensor  # GLOBAL, then the loss of each pack; float64 on the host, valid once `event` has happened
    records: list[np.ndarray]
    skipped: bool = False
    event: Any = None
    event_before: Any = None

    def read(self) -> Reading:
        """Wait for the numbers of this step."""
        if self.event is not None:
            self.event.synchronize()
        numbers = self.values.tolist()
        named = dict(zip(GLOBAL, numbers, strict=False))
        return Reading(
            step=self.step,
            lr=self.lr,
            loss=named["loss"] / max(named["targets"], 1.0),
            grad_norm=named["grad_norm"],
            counts={name: int(named[name]) for name in COUNTS},
            flops=named["flops"],
            stop=named["stop"] > 0,
            skipped=self.skipped,
            packs=numbers[len(GLOBAL) :],
            records=self.records,
            seconds=self.event_before.elapsed_time(self.event) / 1e3 if self.event_before else None,
        )


class TrainStep:
    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, PackedBatch], tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        device: torch.device,
        *,
        clip: float | None,
        scaler: LossScaler | None,
        skip_nonfinite: bool,
        sync_each: bool,
        graphs: bool = False,
    ):
        """scaler: fp16 only. skip_nonfinite: no update from a bad gradient, instead of stopping.

        sync_each: reduce gradients after each micro-batch, not once a step: slower, but only a shard is kept.
        graphs: record packs as CUDA graphs; for a model that FSDP2 does not shard, and that reads nothing of a batch on
        the host.
        """
        self.model, self.loss, self.optimizer, self.device = model, loss, optimizer, device
        self.clip, self.scaler, self.skip_nonfinite, self.sync_each = clip, scaler, skip_nonfinite, sync_each
        self.waits = device.type != "cuda" or scaler is not None or skip_nonfinite  # a step is over when it returns
        self.event: Any = None
        self.pipeline = pipeline_of(model)
        self.graphed = Graphed(self._forward_backward, device) if graphs else None

    def __call__(self, step: int, batches: list[PackedBatch], targets: int, lr: float, stop: bool = False) -> Pending:
        """batches: this rank's packs. targets: how many this rank has. stop: this rank was asked to stop."""
        totals = self._count(batches, targets, stop)
        scale = data_world_size() * (self.scaler.scale if self.scaler else 1.0) / totals[1].clamp(min=1)
        packs = self._backward(batches, scale)
        totals[0] = packs.sum()
        all_reduce_sum(totals[:1])
        norm = self._norm()
        totals[-1] = norm
        skipped = not self._may_update(norm, totals[0])
        if not skipped:
            if self.clip is not None:
                torch.nn.utils.clip_grads_with_norm_(self.optimizer.names, self.clip, norm)
            self.optimizer.step(lr)
        self.optimizer.zero_grad(keep=self.graphed is not None)
        return self._pending(step, lr, torch.cat((totals, packs)), [b.records for b in batches], skipped)

    def close(self) -> None:
        """Before the process group is left."""
        if self.graphed is not None:
            self.graphed.close()

    def _count(self, batches: list[PackedBatch], targets: int, stop: bool) -> Tensor:
        """(len(GLOBAL),) float64: the sums over all ranks of what the host knows before the step; the rest is 0."""
        tokens = sum(b.num_tokens for b in batches)
        padded = sum(len(b.ids) for b in batches)
        decoder_tokens = sum(b.num_decoder_tokens for b in batches)
        decoder_padded = sum(len(b.decoder_ids) for b in batches if b.decoder_ids is not None)
        flops = sum(self.model.flops(b) for b in batches)  # type: ignore[operator]
        known = [0, targets, tokens, padded, decoder_tokens, decoder_padded, flops, stop, 0]
        local = torch.tensor(known, dtype=torch.float64)
        if self.device.type == "cuda":
            local = local.pin_memory().to(self.device, non_blocking=True)
        return all_reduce_sum(local)

    def _backward(self, batches: list[PackedBatch], scale: Tensor) -> Tensor:
        """Gradients of the packs added up; returns their summed losses, (P,) float64."""
        if self.graphed is not None:
            return torch.stack([self.graphed(batch, scale)[0] for batch in batches]).double()
        here = [batch.to(self.device, non_blocking=True) for batch in batches]
        if self.pipeline is not None:
            return self.pipeline.backward(here, scale, self.loss)
        losses = []
        for batch in here:
            set_gradient_sync(self.model, batch is here[-1] or self.sync_each)
            losses.append(self._forward_backward(batch, scale)[0])
        return torch.stack(losses).double()

    def _forward_backward(self, batch: PackedBatch, scale: Tensor) -> tuple[Tensor]:
        loss_sum, _ = self.loss(self.model(batch), batch)
        (loss_sum * scale).backward()
        return (loss_sum.detach(),)

    def _norm(self) -> Tensor:
        """The norm of the whole gradient, over all ranks, the loss scale taken out; 0-dim on the device."""
        gradients = {name: p.grad for p, name in self.optimizer.names.items() if p.grad is not None}
        if self.scaler is not None:
            for gradient in gradients.values():
                gradient.mul_(1.0 / self.scaler.scale)
        return total_norm(self.model, gradients)

    def _may_update(self, norm: Tensor, loss: Tensor) -> bool:
        """Whether to update: always, but where a bad gradient is to be skipped; waits for the device only then."""
        if self.scaler is None and not self.skip_nonfinite:
            return True
        finite_loss, finite = (bool(x) for x in torch.isfinite(torch.stack((loss, norm.double()))).tolist())
        if self.scaler is not None and finite_loss:
            exhausted = not finite and self.scaler.scale <= self.scaler.lowest
            self.scaler.update(finite)
            if exhausted and not self.skip_nonfinite:
                return True  # no scale is small enough: let the loop see it and stop
        elif not self.skip_nonfinite:
            return True
        return finite and finite_loss

    def _pending(self, step: int, lr: float, values: Tensor, records: list[np.ndarray], skipped: bool) -> Pending:
        if values.device.type != "cuda":
            return Pending(step, lr, values, records, skipped=skipped)
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        before, self.event = self.event, torch.cuda.Event(enable_timing=True)
        self.event.record()
        return Pending(step, lr, host, records, skipped, self.event, before)
