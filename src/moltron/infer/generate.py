"""The decoder's engine: hidden states of an encoder in, ids out: greedy, sampled or by beam search.

    hiddens (L, D) ──sort by length, fill batches of rows──> packed memory [+ noise] ──model.start──> cache
    [<bos>] ──model.step, one token a row, K and V kept──> logits (B, V) ──choose──> ids … until <eos>

A row is one decoding of one record's hidden states; what it draws is a function of (seed, its key, step), never of the
other rows. Rows that have ended leave the batch from time to time. Knows nothing of text, files or chemistry.

R rows, B rows in a batch, K beams, L tokens of one record, S the longest L, D width, V vocabulary, C tokens generated
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from moltron.common import rng
from moltron.layers.layout import Layout
from moltron.parallel.precision import DTYPES, resolve_precision

CHECK_EVERY = 8  # steps between two looks at which rows have ended: a look waits for the device


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    beams: 1, or the width of a beam search. sample: draw instead of taking the likeliest, after `temperature`, `top_k`
    (0: all) and `top_p` (the smallest set of tokens with this much probability; 1: all). max_tokens: None: what the
    model has positions for. length_penalty: α of Wu et al. 2016, scores are Σ log p / ((5 + length) / 6)^α.
    radius: standard deviation of the normal noise added to the hidden states. seed: of noise and draws.
    """

    beams: int = 1
    sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = None
    length_penalty: float = 0.0
    radius: float = 0.0
    seed: int = 0

    def problems(self) -> list[str]:
        """What cannot work, as sentences."""
        noise = f"scaled_radius={self.radius} and length_penalty={self.length_penalty} must not be negative"
        greedy = f"temperature={self.temperature} must be greater than 0; greedy methods take the likeliest"
        checks = {
            f"beam_size={self.beams} must be at least 1": self.beams < 1,
            f"a beam search (beam_size={self.beams}) does not sample": self.sample and self.beams > 1,
            greedy: not self.temperature > 0,
            f"top_k={self.top_k} must not be negative": self.top_k < 0,
            f"top_p={self.top_p} must lie in (0, 1]": not 0 < self.top_p <= 1,
            f"max_tokens={self.max_tokens} must be at least 1": self.max_tokens is not None and self.max_tokens < 1,
            noise: min(self.radius, self.length_penalty) < 0,
        }
        return [problem for problem, is_wrong in checks.items() if is_wrong]


@dataclass(frozen=True)
class Hypothesis:
    """ids: int64, without the beginning and the end; score: Σ log p, the end included, with the length penalty;
    finished: whether the end came before the limit."""

    ids: np.ndarray
    score: float
    finished: bool


class Generator:
    """Runs a decoder. model: an encoder–decoder with `start(memory, layout, capacity)` and `step(ids, cache)`, on
    `device`, computing in `precision`.

    capacity: tokens a decoder has positions for, its first one included. tokens: how many a batch may keep in its
    caches, all rows together; None: by device. still: told whether rows of this process run on; where it says yes, the
    batch goes on, for the sake of other ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        bos_id: int,
        eos_id: int,
        capacity: int,
        device: torch.device | str = "cpu",
        precision: str = "auto",
        tokens: int | None = None,
        still: Callable[[bool], bool] = bool,
    ):
        self.device, self.model, self.still = torch.device(device), cast(Any, model), still
        self.dtype = DTYPES[resolve_precision(precision, self.device)]
        self.bos_id, self.eos_id, self.capacity = bos_id, eos_id, capacity
        self.tokens = tokens or (2**17 if self.device.type == "cpu" else 2**20)

    def decode(
        self,
        hiddens: Sequence[np.ndarray],
        settings: Decoding,
        rows: np.ndarray | None = None,
        keys: np.ndarray | None = None,
    ) -> list[list[Hypothesis]]:
        """Hypotheses of each row, the best first: one, or `settings.beams` where these are more than one.

        hiddens: N of (L, D). rows: (R,) which of them each row decodes; None: each once. keys: (R,) non-negative
        integers that name the rows' random draws; None: 0 … R−1.
        Raises ValueError for settings that cannot work.
        """
        if problems := settings.problems():
            raise ValueError("; ".join(problems))
        rows = np.arange(len(hiddens)) if rows is None else np.asarray(rows, dtype=np.int64)
        keys = np.arange(len(rows)) if keys is None else np.asarray(keys, dtype=np.int64)
        lengths = np.array([len(h) for h in hiddens], dtype=np.int64)
        if len(rows) and lengths[rows].min() == 0:
            raise ValueError(f"hidden states {int(rows[lengths[rows].argmin()])} have no tokens")
        results: list[list[Hypothesis]] = [[]] * len(rows)
        for batch in self._batches(lengths[rows], settings):
            memory, layout = self._memory(hiddens, lengths, rows[batch], keys[batch], settings)
            decoded = self.decode_packed(memory, layout, keys[batch], settings)
            for row, found in zip(batch.tolist(), decoded, strict=True):
                results[row] = found
        return results

    def decode_packed(
        self, memory_TD: Tensor, layout: Layout, keys: np.ndarray, settings: Decoding
    ) -> list[list[Hypothesis]]:
        """As `decode`, of a pack as `encode` left it, all in one batch: its first sequences, as many as `keys`."""
        decode = self._beams if settings.beams > 1 else self._single
        return decode(memory_TD, layout, keys, settings)

    def limit(self, settings: Decoding) -> int:
        """C, tokens generated at most, the end included."""
        return min(settings.max_tokens or self.capacity, self.capacity)

    def _batches(self, lengths: np.ndarray, settings: Decoding) -> Iterator[np.ndarray]:
        """Rows that run together, the longest first: padded caches are then nearly full."""
        order = np.argsort(-lengths, kind="stable")
        begin = 0
        while begin < len(order):
            cached = settings.beams * (int(lengths[order[begin]]) + self.limit(settings))
            end = begin + max(1, self.tokens // cached)
            yield order[begin:end]
            begin = end

    @torch.no_grad()
    def _memory(
        self, hiddens: Sequence[np.ndarray], lengths: np.ndarray, rows: np.ndarray, keys: np.ndarray, settings: Decoding
    ) -> tuple[Tensor, Layout]:
        """(Σ L, D) of a batch's rows end to end, with their noise; a record that several rows decode is sent once."""
        distinct, which = np.unique(rows, return_inverse=True)
        sent = torch.from_numpy(np.concatenate([hiddens[i] for i in distinct])).to(self.device)
        starts = np.cumsum(lengths[distinct]) - lengths[distinct]
        sizes = lengths[rows]
        layout = Layout.of(sizes)
        position = layout.positions.numpy()
        source = torch.from_numpy(np.repeat(starts[which], sizes) + position).to(self.device)
        memory_TD = sent.float().index_select(0, source)
        if settings.radius:
            states = rng.hash_u64(settings.seed, rng.NOISE, keys)
            token_states = rng.fold(np.repeat(states, sizes), position)
            memory_TD += settings.radius * normal(token_states, memory_TD.shape[1], self.device)
        return memory_TD.to(self.dtype), layout.each(lambda x: x.to(self.device))

    # ------------------------------------------------------------------------------------------ greedy and sampled

    @torch.no_grad()
    def _single(
        self, memory_TD: Tensor, layout: Layout, keys: np.ndarray, settings: Decoding
    ) -> list[list[Hypothesis]]:
        size, limit = len(keys), self.limit(settings)
        cache = self.model.start(memory_TD, layout, limit, size)
        draws_BC = None
        if settings.sample:
            states = rng.hash_u64(settings.seed, rng.SAMPLE, keys)
            draws_BC = torch.from_numpy(rng.unit(rng.fold(states[:, None], np.arange(limit)))).to(self.device)
        ids_BC = torch.full((size, limit), self.eos_id, dtype=torch.int64, device=self.device)
        scores_B = torch.zeros(size, dtype=torch.float64, device=self.device)
        rows = torch.arange(size, device=self.device)  # of the batch: those still running, or not yet dropped
        ended = torch.zeros(size, dtype=torch.bool, device=self.device)
        ids = torch.full((size,), self.bos_id, dtype=torch.int64, device=self.device)
        for step in range(limit):
            log_p_BV = self.model.step(ids, cache).float().log_softmax(-1)
            if draws_BC is None:
                ids = log_p_BV.argmax(-1)
            else:
                ids = draw(log_p_BV, draws_BC[rows, step], settings)
            ids = ids.masked_fill(ended, self.eos_id)
            gained = log_p_BV.gather(1, ids[:, None])[:, 0].masked_fill(ended, 0.0)
            scores_B.index_add_(0, rows, gained.double())
            ids_BC[rows, step] = ids
            ended = ended | (ids == self.eos_id)
            if (step + 1) % CHECK_EVERY == 0:
                running = (~ended).nonzero()[:, 0]
                if not self.still(len(running) > 0):
                    break
                if 0 < len(running) <= len(rows) // 2:
                    cache = cache.select(running)
                    rows, ids, ended = rows[running], ids[running], ended[running]
        results = []
        counts = (ids_BC != self.eos_id).sum(1).tolist()
        for ids, count, log_p in zip(ids_BC.cpu().numpy(), counts, scores_B.tolist(), strict=True):
            finished = count < limit
            score = log_p / penalty(count + finished, settings)
            results.append([Hypothesis(ids[:count].copy(), score, finished)])
        return results

    # --------------------------------------------------------------------------------------------------- beam search

    @torch.no_grad()
    def _beams(self, memory_TD: Tensor, layout: Layout, keys: np.ndarray, settings: Decoding) -> list[list[Hypothesis]]:
        """K live beams a row and its K best finished ones; a row ends when no live beam can still enter those."""
        size, width, limit = len(keys), settings.beams, self.limit(settings)
        cache = self.model.start(memory_TD, layout, limit, size)
        cache = cache.select(torch.arange(size, device=self.device).repeat_interleave(width))
        live = torch.full((size, width), -math.inf, dtype=torch.float64, device=self.device)
        live[:, 0] = 0.0  # all beams are the same at first: one counts
        best = torch.full_like(live, -math.inf)
        live_ids = torch.full((size, width, limit), self.eos_id, dtype=torch.int64, device=self.device)
        best_ids = live_ids.clone()
        ids = torch.full((size * width,), self.bos_id, dtype=torch.int64, device=self.device)
        offsets = torch.arange(size, device=self.device)[:, None] * width
        for step in range(limit):
            log_p = self.model.step(ids, cache).float().log_softmax(-1).double().unflatten(0, (size, width))
            vocab = log_p.shape[-1]
            candidates_BKV = live[..., None] + log_p
            ending = candidates_BKV[..., self.eos_id] / penalty(step + 1, settings)
            best, which = torch.cat((best, ending), 1).topk(width)
            best_ids = torch.cat((best_ids, live_ids), 1).gather(1, which[..., None].expand(-1, -1, limit))
            candidates_BKV[..., self.eos_id] = -math.inf
            live, which = candidates_BKV.flatten(1).topk(width)
            beam, token = which // vocab, which % vocab
            live_ids = live_ids.gather(1, beam[..., None].expand(-1, -1, limit))
            live_ids[..., step] = token
            if (step + 1) % CHECK_EVERY == 0 and bool((live[:, 0] / penalty(limit, settings) <= best[:, -1]).all()):
                break
            ids = token.flatten()
            cache = cache.select((offsets + beam).flatten())
        unfinished = live / penalty(limit, settings) if step + 1 == limit else torch.full_like(live, -math.inf)
        return self._ranked(best, best_ids, unfinished, live_ids)

    def _ranked(self, best: Tensor, best_ids: Tensor, live: Tensor, live_ids: Tensor) -> list[list[Hypothesis]]:
        """The K best of the finished, then of what was cut off at the limit."""
        results = []
        arrays = [x.cpu().numpy() for x in (best, best_ids, live, live_ids)]
        for best_K, best_KC, live_K, live_KC in zip(*arrays, strict=True):
            found = [
                Hypothesis(ids[: int((ids != self.eos_id).sum())].copy(), float(score), finished)
                for finished, scores, rows in ((True, best_K, best_KC), (False, live_K, live_KC))
                for score, ids in zip(scores, rows, strict=True)
                if score > -math.inf
            ]
            results.append(found[: len(best_K)])
        return results


def penalty(length: int, settings: Decoding) -> float:
    """What Σ log p is divided by: ((5 + length) / 6)^α, the end counted (Wu et al. 2016, arXiv:1609.08144, eq. 14)."""
    return ((5 + length) / 6) ** settings.length_penalty


def draw(log_p_BV: Tensor, uniform_B: Tensor, settings: Decoding) -> Tensor:
    """(B,) tokens drawn by their probability after temperature, top-k and top-p (Holtzman et al. 2020). uniform_B in
    [0, 1): the same number gives the same token whatever else is in the batch."""
    p_BV, order_BV = (log_p_BV.double() / settings.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if settings.top_k:
        p_BV[:, settings.top_k :] = 0.0
    if settings.top_p < 1:
        before_BV = p_BV.cumsum(-1) - p_BV
        p_BV = p_BV.masked_fill(before_BV >= settings.top_p * p_BV.sum(-1, keepdim=True), 0.0)
    upto_BV = p_BV.cumsum(-1)
    place = torch.searchsorted(upto_BV, uniform_B.double()[:, None] * upto_BV[:, -1:], right=True)
    kept = (p_BV > 0).sum(-1, keepdim=True)
    return order_BV.gather(1, torch.minimum(place, kept - 1))[:, 0]


def normal(states_T: rng.U64, width: int, device: torch.device) -> Tensor:
    """(T, width) fp32 standard normal numbers, row t a function of states_T[t] alone; drawn on the device.

    Box–Muller of the two 24-bit ends of 64 bits; `rng.fold`'s mixing in wrapping int64.
    """
    x = torch.from_numpy(states_T.view(np.int64)).to(device)[:, None]
    counters = (np.arange(1, width + 1, dtype=np.uint64) * rng.GAMMA).view(np.int64)
    x = x + torch.from_numpy(counters).to(device)
    for shift, factor in ((30, rng.MIX1), (27, rng.MIX2), (31, None)):
        x = x ^ _shifted(x, shift)
        if factor is not None:
            x = x * int(factor.view(np.int64))
    first, second = _shifted(x, 40), x & (2**24 - 1)
    radius = (-2 * ((first.float() + 0.5) / 2**24).log()).sqrt()
    return radius * (second.float() * (2 * math.pi / 2**24)).cos()


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of an unsigned number."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
