"""From a plan to batches: gathers letters, makes ids, packs, corrupts, and does so ahead of the consumer.

    BatchPlan.bins ──Store.gather──> letters ──table──> ids ──specials──> PackedBatch ──corrupt──> Step
    ids in memory ────────────────────────────────────────pack_sequences──> PackedBatch

Optimizer step k is bins k·P … k·P+P−1 of the plan's stream; rank r of W builds those with index ≡ r mod W. One
background thread works ahead: nearly all its time is spent in numpy, outside Python's lock. The loader itself has no
state: a `Step` says where the stream goes on. Knows nothing of models, devices and optimizers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from moltron.data.plan import BatchPlan, Bin, Position, pack_lengths
from moltron.data.store import Store
from moltron.models.batch import PackedBatch


class Objective(Protocol):
    def corrupt(self, batch: PackedBatch, epoch: int) -> PackedBatch: ...


@dataclass(eq=False)
class Step:
    """What one rank computes in one optimizer step.

    batches: P / W packs. count: targets in them. tokens: real ones, filler not counted.
    epoch: of the step's first bin. position: where the stream goes on after this step, over all ranks; JSON-able.
    """

    batches: list[PackedBatch]
    count: int
    tokens: int
    epoch: int
    position: dict[str, Any]


class BatchLoader:
    """Iterates `Step`s for one rank; each `iter()` starts at `position` with a thread of its own.

    packs: P, of all ranks together; a multiple of `world`.
    position: of the last step that was done, None for the beginning.
    epochs: stop there; None: never. The last step is filled up with empty packs, so that all ranks take equally many.
    depth: finished steps that wait at most. pin: page-locked tensors, for copies that overlap with compute.
    wait_seconds: how long the consumer has waited for data so far.
    """

    def __init__(
        self,
        plan: BatchPlan,
        store: Store,
        tokenizer: Any,
        objective: Objective | None,
        packs: int,
        rank: int = 0,
        world: int = 1,
        position: dict[str, Any] | None = None,
        epochs: int | None = None,
        depth: int = 2,
        pin: bool = False,
    ):
        if packs % world:
            raise ValueError(
                f"batch.packs={packs} cannot be shared equally by {world} ranks: make it a multiple of {world}"
            )
        self.plan, self.store, self.tokenizer, self.objective = plan, store, tokenizer, objective
        self.packs, self.rank, self.world, self.depth, self.pin = packs, rank, world, depth, pin
        self.epochs = epochs
        self.start = plan.load(position)
        self.wait_seconds = 0.0
        self._table = tokenizer.table.astype(np.int64)

    def __iter__(self) -> Iterator[Step]:
        ready: queue.Queue[Step | BaseException | None] = queue.Queue(maxsize=self.depth)
        stop = threading.Event()
        device = torch.cuda.current_device() if self.pin else None
        worker = threading.Thread(target=self._work, args=(ready, stop, device), name="batch-loader", daemon=True)
        worker.start()
        try:
            while True:
                begin = time.perf_counter()
                item = ready.get()
                self.wait_seconds += time.perf_counter() - begin
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:  # also when the consumer breaks off: the worker may be waiting for room
            stop.set()
            while worker.is_alive():
                try:
                    ready.get_nowait()
                except queue.Empty:
                    worker.join(timeout=0.01)

    def steps(self) -> Iterator[Step]:
        """The same steps, made by the caller's own thread."""
        bins: list[tuple[int, Bin]] = []
        after = self.start
        for epoch, bin, after in self.plan.bins(self.start, self.epochs):
            bins.append((epoch, bin))
            if len(bins) == self.packs:
                yield self._step(bins, after)
                bins = []
        if bins:
            nothing = np.zeros(0, dtype=np.int64)
            empty = (bins[-1][0], Bin(nothing, nothing, nothing))
            yield self._step(bins + [empty] * (self.packs - len(bins)), after)

    def _work(self, ready: queue.Queue, stop: threading.Event, device: int | None) -> None:
        try:
            if device is not None:  # a new thread would pin through GPU 0, whichever is this rank's
                torch.cuda.set_device(device)
            for step in self.steps():
                ready.put(step)
                if stop.is_set():
                    return
            ready.put(None)
        except BaseException as error:  # raised again by the consumer
            ready.put(error)

    def _step(self, bins: list[tuple[int, Bin]], after: Position) -> Step:
        batches = [self._batch(bin, epoch) for epoch, bin in bins[self.rank :: self.world]]
        targets = [batch.targets.numpy() for batch in batches if batch.targets is not None]
        count = sum(int(np.count_nonzero(t >= 0)) for t in targets)
        tokens = sum(batch.num_tokens for batch in batches)
        return Step(batches, count, tokens, bins[0][0], self.plan.dump(after))

    def _batch(self, bin: Bin, epoch: int) -> PackedBatch:
        plan, tokenizer = self.plan, self.tokenizer
        try:
            letters = self.store.gather(bin.records, bin.crops, bin.lengths)
            batch = PackedBatch.pack(
                add_specials(self._table[letters], bin.lengths, tokenizer.cls_id, tokenizer.eos_id),
                bin.lengths + 2,
                tokens=plan.tokens,
                pad_id=tokenizer.pad_id,
                max_length=plan.max_length,
                records=bin.records,
            )
            if self.objective is not None:
                batch = self.objective.corrupt(batch, epoch)
            return batch.pin_memory() if self.pin else batch
        except Exception as error:
            shown = ", ".join(self.store.ids(bin.records[:8])) + (", …" if len(bin.records) > 8 else "")
            raise RuntimeError(f"cannot build the batch of records {shown} (epoch {epoch}): {error}") from error


def add_specials(residues: np.ndarray, lengths: np.ndarray, cls_id: int, eos_id: int) -> np.ndarray:
    """residues: (Σ lengths,) ids, sequence after sequence -> (Σ lengths + 2 B,), each as `<cls>` residues `<eos>`."""
    ends = np.cumsum(lengths + 2)
    starts = ends - lengths - 2
    ids = np.empty(len(residues) + 2 * len(lengths), dtype=np.int64)
    inside = np.ones(len(ids), dtype=bool)
    inside[starts] = inside[ends - 1] = False
    ids[inside] = residues
    ids[starts], ids[ends - 1] = cls_id, eos_id
    return ids


def pack_sequences(
    sequences: Sequence[np.ndarray], tokens: int, pad_id: int, max_length: int, first_record: int = 0
) -> list[PackedBatch]:
    """Packs of sequences in memory, by the same rule as a plan's. No sequence is cut.

    sequences: ids with specials, each at most max_length ≤ tokens long. `batch.records` of the result counts from
    `first_record` in the order given, which is how a caller puts results back into order.
    """
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    if lengths.size and lengths.max() > max_length:
        raise ValueError(
            f"sequence {first_record + int(lengths.argmax())} has {lengths.max()} tokens: at most {max_length} may be"
        )
    return [
        PackedBatch.pack(
            np.concatenate([sequences[i] for i in items]),
            lengths[items],
            tokens=tokens,
            pad_id=pad_id,
            max_length=max_length,
            records=items + first_record,
        )
        for items in pack_lengths(lengths, tokens)
    ]
