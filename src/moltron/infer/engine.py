"""The encoder's engine: ids in, arrays out, in the order given.

    ids ──fill packs of T tokens──> PackedBatch ──model──> hidden ──pool──> (N, D)
         host, in a thread          pinned                 └──> hiddens (L, D), logits (L, V)

A pack holds at least 64 tokens and a multiple of 64, so that on a CPU in fp32 a sequence has the same bits alone and in
any company; there packs are filled by length, for attention goes by groups of one length. On CUDA all packs of a run
have one T, in the order given; nothing waits for the device except for results two packs old.
Knows nothing of text, files or requests.

T tokens (packed), B pieces, D width, L residues, V vocabulary, N sequences
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moltron.layers.blocks import FeedForward
from moltron.layers.pooling import pool
from moltron.models.batch import PackedBatch
from moltron.models.registry import compiles
from moltron.models.spec import ParallelPlan
from moltron.parallel.apply import compile_units
from moltron.parallel.graphs import Graphed
from moltron.parallel.precision import DTYPES, resolve_precision

Key = tuple[str, int]  # "pooled" | "hiddens" | "logits", layer
POOLINGS = ("mean", "cls", "max")
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
    """Results of N pieces or sequences, in order: `pooled` (N, D) fp32 a layer; lists of (rows, D) and (rows, V).

    `encode` pools a piece to its sum (mean), maximum (max) or first row (cls): `windows.merge` goes on from there.
    """

    pooled: dict[int, np.ndarray]
    hiddens: dict[int, list[np.ndarray]]
    logits: list[np.ndarray]


class _Pack(NamedTuple):
    """Pieces on one token axis. pieces: which ones; kept: (B, 2) the rows [from, to) of each that count.

    pooled: (B, 2) int32, the rows that are pooled; on CUDA with empty runs for the pack's filler.
    """

    batch: PackedBatch
    pieces: np.ndarray | slice
    kept: np.ndarray
    pooled: Tensor


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
        self.pad_id = pad_id
        self._plan = plan
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._forwards: dict[Wanted, Callable[[PackedBatch, Tensor], tuple[Tensor, ...]]] = {}
        self._compiled = False
        self._width = self.model.config.hidden_size
        if tokens is None:
            tokens = 4096 if self._copies is None else int(np.clip(131072 * 320 // self._width, 8192, 131072))
        self.tokens = _round_up(tokens)

    def compile(self) -> None:
        """Compile the plan's units and record packs as CUDA graphs, if they can be: pays from some tens of packs."""
        can = compiles(self.model.config, self.precision, self.device.type, trains=False)
        if self._plan is not None and can and not self._compiled:
            for module in getattr(self.model, "encoder", self.model).modules():
                if isinstance(module, FeedForward):
                    module.fused = True
            compile_units(self.model, self._plan)
            self._compiled = True
            self._forwards.clear()

    def encode(self, ids: Sequence[np.ndarray], wanted: Wanted, keep: np.ndarray | None = None) -> Encoded:
        """Run the model over pieces of ids, each with its specials; results in the order given.

        keep: (P, 2), the rows [from, to) of each piece that count; None: all but the first and the last (the specials).
        """
        if wanted.logits and getattr(self.model, "decoder", None) is not None:
            raise ValueError(
                "an encoder–decoder's logits are of its decoder's tokens: ask for embeddings or hiddens here"
            )
        lengths = np.fromiter(map(len, ids), dtype=np.int64, count=len(ids))
        if keep is None:
            keep = np.stack([np.ones_like(lengths), lengths - 1], axis=1)
        pooled_layers = wanted.layers if wanted.pooling else ()
        pooled = {layer: np.empty((len(ids), self._width), dtype=np.float32) for layer in pooled_layers}
        hiddens = {layer: [np.empty(0)] * len(ids) for layer in (wanted.layers if wanted.hiddens else ())}
        logits = [np.empty(0)] * len(ids) if wanted.logits else []
        numbers = np.arange(len(ids))
        by_row = {("hiddens", layer): rows for layer, rows in hiddens.items()}
        by_row |= {("logits", -1): logits} if wanted.logits else {}
        for pack, arrays in self._run(self._packs(ids, lengths, keep, wanted), wanted):
            for layer in pooled_layers:
                pooled[layer][pack.pieces] = arrays["pooled", layer]
            for key, rows in by_row.items():
                for piece, (begin, end) in zip(numbers[pack.pieces].tolist(), pack.kept.tolist(), strict=True):
                    rows[piece] = arrays[key][begin:end].copy()
        return Encoded(pooled, hiddens, logits)

    # ------------------------------------------------------------------------------------------------------- packs

    def _packs(
        self, ids: Sequence[np.ndarray], lengths: np.ndarray, keep: np.ndarray, wanted: Wanted
    ) -> Iterator[_Pack]:
        order = np.argsort(-lengths, kind="stable") if self._copies is None else None
        ends = np.cumsum(lengths if order is None else lengths[order])
        begin = done = 0
        while begin < len(ids):
            first = int(lengths[begin if order is None else order[begin]])
            budget = max(self.tokens, _round_up(first))
            end = int(np.searchsorted(ends, done + budget, side="right"))
            pieces = slice(begin, end) if order is None else order[begin:end]
            tokens, sizes = _round_up(int(ends[end - 1]) - done), lengths[pieces]
            longest, begin, done = int(sizes.max()), end, int(ends[end - 1])
            if order is None:  # one shape a run, a power of two where there is little; `longest` takes few values
                tokens = budget if ends[-1] > budget else min(budget, max(QUANTUM, _power_of_two(int(ends[-1]))))
                longest = max(128, _power_of_two(longest))
            settings: Any = dict(tokens=tokens, pad_id=self.pad_id, max_length=longest, pin=order is None)
            chosen = ids[pieces] if isinstance(pieces, slice) else [ids[piece] for piece in pieces.tolist()]
            batch = PackedBatch.pack(chosen, sizes, **settings)
            starts = (np.cumsum(sizes) - sizes)[:, None]
            kept = starts + keep[pieces]
            pooled = np.add(starts, [0, 1]) if wanted.pooling == "cls" else kept
            if self._copies is None:
                yield _Pack(batch, pieces, kept, torch.from_numpy(pooled.astype(np.int32)))
            else:
                runs = torch.zeros(len(batch.layout.lengths), 2, dtype=torch.int32, pin_memory=True)
                runs.numpy()[: len(sizes)] = pooled
                yield _Pack(batch, pieces, kept, runs)

    # ------------------------------------------------------------------------------------------------------ device

    def _run(self, packs: Iterator[_Pack], wanted: Wanted) -> Iterator[tuple[_Pack, dict[Key, np.ndarray]]]:
        depth = 0 if self._copies is None else 2
        waiting: deque[tuple[_Pack, Callable[[], dict[Key, np.ndarray]]]] = deque()
        for pack in ahead(packs, depth=3) if depth else packs:
            waiting.append((pack, self._to_host(self._forward(pack, wanted))))
            if len(waiting) > depth:
                pack, arrived = waiting.popleft()
                yield pack, arrived()
        for pack, arrived in waiting:
            yield pack, arrived()

    @torch.inference_mode()
    def _forward(self, pack: _Pack, wanted: Wanted) -> dict[Key, Tensor]:
        keys: list[Key] = [("pooled", layer) for layer in wanted.layers if wanted.pooling]
        keys += [("hiddens", layer) for layer in wanted.layers if wanted.hiddens]
        keys += [("logits", -1)] if wanted.logits else []
        if wanted not in self._forwards:
            function = functools.partial(self._compute, keys, wanted)
            self._forwards[wanted] = Graphed(function, self.device) if self._compiled else function
        results = dict(zip(keys, self._forwards[wanted](pack.batch, pack.pooled), strict=True))
        return {(what, at): x[: len(pack.kept)] if what == "pooled" else x for (what, at), x in results.items()}

    def _compute(self, keys: list[Key], wanted: Wanted, batch: PackedBatch, rows: Tensor) -> tuple[Tensor, ...]:
        batch, rows = batch.to(self.device, non_blocking=True), rows.to(self.device, non_blocking=True)
        output, results = self.model(batch, hidden_layers=wanted.layers), []
        for what, layer in keys:
            if what == "pooled":
                results.append(pool(output.hiddens[layer], rows, "max" if wanted.pooling == "max" else "sum"))
            elif what == "hiddens":
                results.append(output.hiddens[layer].to(wanted.dtype))
            else:  # of all rows: a few rows alone would have other last bits
                results.append(self.model.logits(output.hidden).to(wanted.dtype))
        return tuple(results)

    def _to_host(self, tensors: dict[Key, Tensor]) -> Callable[[], dict[Key, np.ndarray]]:
        """Into pinned memory, on a stream of its own: the next pack is computed meanwhile. What comes back waits."""
        if self._copies is None:
            return lambda: {key: tensor.numpy() for key, tensor in tensors.items()}
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        host = {}
        with torch.cuda.stream(self._copies):
            for key, tensor in tensors.items():
                host[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                host[key].copy_(tensor, non_blocking=True)
                tensor.record_stream(self._copies)
            event = self._copies.record_event()

        def arrived() -> dict[Key, np.ndarray]:
            event.synchronize()
            return {key: tensor.numpy() for key, tensor in host.items()}

        return arrived


def _round_up(n: int) -> int:
    return -(-n // QUANTUM) * QUANTUM


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def ahead(items: Iterable[Any], depth: int) -> Iterator[Any]:
    """The same items, made in a thread up to `depth` ahead. Errors arrive here; leaving early ends the thread."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as worker:
        coming = deque(worker.submit(next, source, end) for _ in range(depth))
        while (item := coming.popleft().result()) is not end:
            coming.append(worker.submit(next, source, end))
            yield item
