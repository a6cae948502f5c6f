"""The encoder's engine: ids in, arrays out, in the order given.

    ids ──sort by length, fill packs of T tokens──> PackedBatch ──model──> hidden ──pool──> (N, D)
         host, in a thread                          pinned copies          └──> hiddens (L, D), logits (L, V)

A pack holds at least 64 tokens and a multiple of 64, so that on a CPU in fp32 a sequence has the same bits alone and in
any company. On CUDA all packs of a run have one T; nothing waits for the device except for results two packs old.
Knows nothing of text, files or requests.

T tokens (packed), B pieces, D width, L residues, V vocabulary, N sequences
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from moltron.infer.pooling import pool, segment_lengths
from moltron.models.batch import PackedBatch
from moltron.models.spec import ParallelPlan
from moltron.parallel.apply import compile_units
from moltron.parallel.precision import DTYPES, resolve_precision

Item = TypeVar("Item")
_Tensors = dict[tuple[str, int], Tensor]  # ("pooled" | "hiddens" | "logits", layer)
QUANTUM = 64  # rows; fewer change a linear layer's last bits


@dataclass(frozen=True)
class Wanted:
    """What to compute. layers: 0 = embeddings … number of layers = after the final norm. pooling: mean | cls | max."""

    layers: tuple[int, ...]
    pooling: str | None = "mean"
    hiddens: bool = False
    logits: bool = False
    dtype: torch.dtype = torch.float32  # of hiddens and logits


@dataclass
class Encoded:
    """Results of P pieces: `pooled` (P, D) fp32 a layer, see pooling.pool; lists of (rows, D) and (rows, V)."""

    pooled: dict[int, np.ndarray]
    hiddens: dict[int, list[np.ndarray]]
    logits: list[np.ndarray]


@dataclass
class _Pack:
    """Some of the pieces on one token axis. rows: their indices; keep: (B, 2) rows kept of each."""

    batch: PackedBatch
    rows: np.ndarray
    keep: np.ndarray
    segments: Tensor
    starts: Tensor


class Encoder:
    """Runs a model over many sequences. model: float32 weights, cast here once and moved to `device`.

    tokens: T, tokens a pack; None: by device and width. plan: what `compile()` compiles.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pad_id: int,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        tokens: int | None = None,
        plan: ParallelPlan | None = None,
    ):
        self.device = torch.device(device)
        self.precision = resolve_precision(precision, self.device)
        self.model: Any = model.to(device=self.device, dtype=DTYPES[self.precision]).eval().requires_grad_(False)
        self.config: Any = model.config
        self.pad_id = pad_id
        self.tokens = _round_up(tokens or self._default_tokens(), QUANTUM)
        self._plan = plan
        self._on_cuda = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if self._on_cuda else None

    def _default_tokens(self) -> int:
        if self.device.type != "cuda":
            return 4096
        return int(np.clip(131072 * 320 // self.config.hidden_size, 8192, 131072))

    def compile(self) -> None:
        """Compile the plan's units: pays on CUDA from some tens of packs."""
        if self._plan is not None and self._on_cuda:
            compile_units(self.model, self._plan)
            self._plan = None

    def encode(self, ids: Sequence[np.ndarray], wanted: Wanted, keep: np.ndarray | None = None) -> Encoded:
        """Run the model over pieces of ids, each with its specials; results in the order given.

        keep: (P, 2), the rows [from, to) of each piece that count; None: all but the first and the last (the specials).
        """
        lengths = np.fromiter((len(x) for x in ids), dtype=np.int64, count=len(ids))
        if keep is None:
            keep = np.stack([np.ones_like(lengths), lengths - 1], axis=1)
        width, pooled_layers = self.config.hidden_size, wanted.layers if wanted.pooling else ()
        result = Encoded(
            pooled={layer: np.empty((len(ids), width), dtype=np.float32) for layer in pooled_layers},
            hiddens={layer: [np.empty(0)] * len(ids) for layer in wanted.layers} if wanted.hiddens else {},
            logits=[np.empty(0)] * len(ids) if wanted.logits else [],
        )
        for pack, arrays in self._run(self._packs(ids, lengths, keep), wanted):
            for layer in pooled_layers:
                result.pooled[layer][pack.rows] = arrays["pooled", layer]
            for layer, rows in result.hiddens.items():
                _scatter(rows, pack, arrays["hiddens", layer])
            if wanted.logits:
                _scatter(result.logits, pack, arrays["logits", -1])
        return result

    # ------------------------------------------------------------------------------------------------------- packs

    def _packs(self, ids: Sequence[np.ndarray], lengths: np.ndarray, keep: np.ndarray) -> Iterator[_Pack]:
        order = np.argsort(-lengths, kind="stable")
        sorted_ends = np.cumsum(lengths[order])
        begin, total = 0, int(lengths.sum())
        while begin < len(order):
            done = int(sorted_ends[begin - 1]) if begin else 0
            longest = int(lengths[order[begin]])
            budget = max(self.tokens, _round_up(longest, QUANTUM))
            end = int(np.searchsorted(sorted_ends, done + budget, side="right"))
            filled = int(sorted_ends[end - 1]) - done
            # CUDA: one shape a run, or a power of two where there is little to do; `max_length` too takes few values
            small = budget if total > budget else min(budget, max(QUANTUM, _power_of_two(total)))
            tokens = small if self._on_cuda else _round_up(filled, QUANTUM)
            max_length = max(128, _power_of_two(longest)) if self._on_cuda else longest
            yield self._pack(ids, order[begin:end], lengths, keep, tokens, max_length)
            begin = end

    def _pack(self, ids, rows: np.ndarray, lengths: np.ndarray, keep: np.ndarray, tokens: int, longest: int) -> _Pack:
        flat = np.concatenate([ids[row] for row in rows])
        batch = PackedBatch.pack(flat, lengths[rows], tokens=tokens, pad_id=self.pad_id, max_length=longest)
        segments = torch.from_numpy(segment_lengths(lengths[rows], keep[rows], tokens))
        starts = torch.from_numpy(np.cumsum(lengths[rows]) - lengths[rows])
        if self._on_cuda:
            batch, segments, starts = batch.pin_memory(), segments.pin_memory(), starts.pin_memory()
        return _Pack(batch, rows, keep[rows], segments, starts)

    # ------------------------------------------------------------------------------------------------------ device

    def _run(self, packs: Iterator[_Pack], wanted: Wanted) -> Iterator[tuple[_Pack, dict[tuple[str, int], np.ndarray]]]:
        if not self._on_cuda:
            for pack in packs:
                yield pack, {key: value.numpy() for key, value in self._forward(pack, wanted).items()}
            return
        waiting: deque[tuple[_Pack, _Tensors, torch.cuda.Event]] = deque()
        for pack in ahead(packs, depth=3):
            waiting.append((pack, *self._to_host(self._forward(pack, wanted))))
            if len(waiting) > 2:
                yield _arrived(*waiting.popleft())
        while waiting:
            yield _arrived(*waiting.popleft())

    @torch.inference_mode()
    def _forward(self, pack: _Pack, wanted: Wanted) -> _Tensors:
        batch = pack.batch.to(self.device, non_blocking=True)
        segments = pack.segments.to(self.device, non_blocking=True)
        starts = pack.starts.to(self.device, non_blocking=True)
        output = self.model(batch, hidden_layers=wanted.layers)
        results = {}
        for layer in wanted.layers:
            if wanted.pooling:
                results["pooled", layer] = pool(output.hiddens[layer], segments, starts, wanted.pooling)
            if wanted.hiddens:
                results["hiddens", layer] = output.hiddens[layer].to(wanted.dtype)
        if wanted.logits:  # of all rows: a few rows alone would have other last bits
            results["logits", -1] = self.model.logits(output.hidden).to(wanted.dtype)
        return results

    def _to_host(
        self, tensors: dict[tuple[str, int], Tensor]
    ) -> tuple[dict[tuple[str, int], Tensor], torch.cuda.Event]:
        assert self._copies is not None
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        host = {}
        with torch.cuda.stream(self._copies):
            for key, tensor in tensors.items():
                host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host[key].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._copies)
            event = torch.cuda.Event()
            event.record(self._copies)
        return host, event


def _arrived(pack: _Pack, host: _Tensors, event: torch.cuda.Event):
    event.synchronize()
    return pack, {key: value.numpy() for key, value in host.items()}


def _scatter(rows: list[np.ndarray], pack: _Pack, values: np.ndarray) -> None:
    """Give each piece its own kept rows of a pack's (T, …) array."""
    starts = pack.starts.numpy()
    for row, begin, end in zip(pack.rows.tolist(), starts + pack.keep[:, 0], starts + pack.keep[:, 1], strict=True):
        rows[row] = values[begin:end].copy()


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items, made in a thread up to `depth` ahead. Errors arrive here; leaving early ends the thread."""
    box: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                box.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = box.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
