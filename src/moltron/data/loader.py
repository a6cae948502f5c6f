"""From a plan to batches: gathers letters, makes ids, lets the objective make packs, ahead of the consumer.

    BatchPlan.bins ──Store.gather──> letters ──table──> ids ──objective.batch──> PackedBatch … ──> Step

Optimizer step k is bins k·P … k·P+P−1 of the plan's stream; rank r of W builds those with index ≡ r mod W, and an empty
pack where another rank has one more: FSDP's ranks gather weights together. With `workers` this happens in processes of
their own (torch's DataLoader): a thread would take turns with the one that launches kernels. The loader itself has no
state: a `Step` says where the stream goes on. Knows nothing of models, devices and optimizers.
"""

from __future__ import annotations

import atexit
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from moltron.data.plan import BatchPlan, Bin, Position
from moltron.data.store import Store
from moltron.models.batch import PackedBatch

AHEAD = 8  # packs that a worker builds ahead: a window of the plan takes as long as some of them


@dataclass(eq=False)
class Step:
    """What one rank computes in one optimizer step.

    batches: ⌈P / W⌉ packs. count: targets in them. tokens, decoder_tokens: real ones, filler not counted.
    position: where the stream goes on after this step, over all ranks; JSON-able.
    """

    batches: list[PackedBatch]
    count: int
    tokens: int
    decoder_tokens: int
    position: dict[str, Any]

    def pin_memory(self) -> Step:
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


class BatchLoader(IterableDataset):
    """Iterates `Step`s for one rank; each `iter()` starts at `position`.

    packs: P, of all ranks together.
    position: of the last step that was done, None for the beginning.
    epochs: stop there; None: never. The last step is filled up with empty packs.
    workers: processes that build steps ahead, about AHEAD packs each; 0: built when asked for.
    pin: page-locked tensors, for copies that overlap with compute.
    """

    def __init__(
        self,
        plan: BatchPlan,
        store: Store,
        tokenizer: Any,
        packs: int,
        rank: int = 0,
        world: int = 1,
        position: dict[str, Any] | None = None,
        epochs: int | None = None,
        workers: int = 0,
        pin: bool = False,
    ):
        self.plan, self.store, self.objective = plan, store, plan.objective
        self.packs, self.rank, self.world, self.pin = packs, rank, world, pin
        self.epochs, self.workers = epochs, workers
        self.start = plan.load(position)
        self._table = tokenizer.table.astype(np.int64)

    def __iter__(self) -> Iterator[Step]:
        if get_worker_info() is not None:  # in a worker: the steps that are its own
            yield from self.steps()
            return
        if not self.workers:
            yield from (step.pin_memory() if self.pin else step for step in self.steps())
            return
        loader = DataLoader(
            self,
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=max(2, AHEAD * self.world // self.packs),
            pin_memory=self.pin,
            multiprocessing_context="fork",
            worker_init_fn=_leave_signals_to_the_trainer,
        )
        steps: Any = iter(loader)
        # a process that ends with this generator unfinished, e.g. by an error, would send its workers SIGTERM and wait
        atexit.register(steps._shutdown_workers)
        try:
            yield from steps
        finally:
            atexit.unregister(steps._shutdown_workers)
            steps._shutdown_workers()

    def steps(self) -> Iterator[Step]:
        """The steps, built here and now; in one of several worker processes, every so manieth of them."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for bins, after in islice(self._groups(), number, None, workers):
            yield self._step(bins, after)

    def _groups(self) -> Iterator[tuple[list[tuple[int, Bin]], Position]]:
        """The (epoch, bin) of each step, and where the stream goes on."""
        bins: list[tuple[int, Bin]] = []
        after = self.start
        for epoch, bin, after in self.plan.bins(self.start, self.epochs):
            bins.append((epoch, bin))
            if len(bins) == self.packs:
                yield bins, after
                bins = []
        if bins:
            yield bins, after

    def _step(self, bins: list[tuple[int, Bin]], after: Position) -> Step:
        whole, nothing = -(-self.packs // self.world) * self.world, np.zeros(0, dtype=np.int64)
        bins = bins + [(bins[-1][0], Bin(nothing, nothing, nothing))] * (whole - len(bins))
        batches = [self._batch(bin, epoch) for epoch, bin in bins[self.rank :: self.world]]
        targets = [batch.targets.numpy() for batch in batches if batch.targets is not None]
        count = sum(int(np.count_nonzero(t >= 0)) for t in targets)
        tokens, decoder_tokens = sum(b.num_tokens for b in batches), sum(b.num_decoder_tokens for b in batches)
        return Step(batches, count, tokens, decoder_tokens, self.plan.dump(after))

    def _batch(self, bin: Bin, epoch: int) -> PackedBatch:
        plan = self.plan
        try:
            targets = None
            if bin.targets is not None:
                lengths = self.store.lengths[bin.targets].astype(np.int64)
                targets = self._ids(bin.targets, np.zeros_like(lengths), lengths), lengths
            ids = self._ids(bin.records, bin.crops, bin.lengths)
            sizes: Any = dict(tokens=plan.tokens, limits=plan.limits, targets=targets)
            return self.objective.batch(ids, bin.lengths, bin.records, epoch, **sizes)
        except Exception as error:
            shown = ", ".join(self.store.ids(bin.records[:8])) + (", …" if len(bin.records) > 8 else "")
            raise RuntimeError(f"cannot build the batch of records {shown} (epoch {epoch}): {error}") from error

    def _ids(self, records: np.ndarray, crops: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return self._table[self.store.gather(records, crops, lengths)]


def _leave_signals_to_the_trainer(worker: int) -> None:
    """A job's SIGTERM goes to every process of it; the trainer saves its state and then ends the workers itself."""
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
