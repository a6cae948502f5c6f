"""A model in three lines, and the path from text to results that the commands share.

    from moltron import load_model
    model = load_model("runs/esm2_8M")
    model.embed(["MKTAYIAKQRQISFVKSHFSRQ"])          # numpy, (sequences, width)
    load_model("runs/megamolbart").sample(["CCO"])   # new molecules near this one

Here a sequence meets the limit of its model: `long` says what happens to one with more tokens than fit. A residue is a
token of a sequence that is no special: of molecules, an atom, bond or bracket.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from moltron.checkpoint.weights import Pretrained, load_pretrained
from moltron.common.logging import get_logger
from moltron.infer.engine import POOLINGS, Encoded, Encoder, Wanted
from moltron.infer.generate import Decoding, Generator, Hypothesis
from moltron.infer.sampling import METHODS, Sampling, interpolate
from moltron.infer.windows import POLICIES, cut, default_overlap, merge, stitch
from moltron.models.batch import PackedBatch
from moltron.models.contacts import predict_contacts
from moltron.models.spec import num_parameters
from moltron.parallel.collectives import find_device
from moltron.tokenizers import get_tokenizer

log = get_logger(__name__)


def load_model(what: str, device: str = "auto", precision: str = "auto") -> Model:
    """A model ready to embed. what: a run folder, a checkpoint of ours, a Hugging Face folder, a fair-esm .pt, or a
    name that `moltron download` knows. device: auto | cpu | cuda. precision: auto (bf16 on CUDA) | fp32 | bf16 | fp16.
    """
    return Model(load_pretrained(what), find_device(device), precision)


class Model:
    """Sequences in, numpy or sequences out. All methods keep the order; residues only, without special tokens."""

    def __init__(
        self,
        pretrained: Pretrained,
        device: str | torch.device = "cpu",
        precision: str = "auto",
        tokens: int | None = None,
    ):
        self.spec, self.config, self.source = pretrained.spec, pretrained.config, pretrained.source
        self.tokenizer = get_tokenizer(self.config.tokenizer)
        pad_id, plan = self.tokenizer.pad_id, self.spec.plan
        self.encoder = Encoder(
            pretrained.model, pad_id=pad_id, device=device, precision=precision, tokens=tokens, plan=plan
        )
        self.module = self.encoder.model

    def __repr__(self) -> str:
        c, e = self.config, self.encoder
        return (
            f"Model({self.spec.name}, {num_parameters(e.model) / 1e6:.1f}M parameters, {c.num_layers} layers, "
            f"width {c.hidden_size}, up to {self.max_residues()} residues, {e.precision} on {e.device}, {self.source})"
        )

    def embed(
        self,
        sequences: Sequence[str],
        pooling: str = "mean",
        *,
        layer: int = -1,
        long: str = "error",
        overlap: int | None = None,
    ) -> np.ndarray:
        """(N, D) fp32. pooling: mean (over residues) | cls | max. layer: 0 = embeddings, -1 = after the final norm.

        long: error (ValueError) | truncate | window, for sequences of more residues than the model's limit. overlap:
        residues shared by neighbouring windows; None: 128, at most half a window.
        """
        self.check_pooling(pooling)
        layers = self.layer_numbers([layer])
        wanted = Wanted(layers, pooling)
        return self.run(self._cleaned(sequences), wanted, long=long, overlap=overlap).pooled[layers[0]]

    def hiddens(
        self, sequences: Sequence[str], *, layer: int = -1, long: str = "error", overlap: int | None = None
    ) -> list[np.ndarray]:
        """One (L, D) fp32 a sequence; arguments as in `embed`."""
        layers = self.layer_numbers([layer])
        wanted = Wanted(layers, None, hiddens=True)
        return self.run(self._cleaned(sequences), wanted, long=long, overlap=overlap).hiddens[layers[0]]

    def logits(self, sequences: Sequence[str], *, long: str = "error", overlap: int | None = None) -> list[np.ndarray]:
        """One (L, V) fp32 a sequence; columns are `tokenizer.pieces`."""
        return self.run(self._cleaned(sequences), Wanted((), None, logits=True), long=long, overlap=overlap).logits

    @torch.inference_mode()
    def contacts(self, sequence: str) -> np.ndarray:
        """(L, L) fp32, probability of contact of each pair of residues.

        Raises ValueError without a fitted contact head: published ESM-1b and ESM-2 weights have one, ours do not.
        """
        (cleaned,) = self._cleaned([sequence])
        (ids,), _, _ = self._pieces([cleaned], "error", self.max_residues(), 0)
        n = len(ids)
        batch = PackedBatch.pack(ids, np.array([n]), tokens=n, pad_id=self.tokenizer.pad_id, max_length=n)
        return predict_contacts(self.module, batch.to(self.encoder.device)).cpu().numpy()

    # ------------------------------------------------------------------------------------------------ new sequences

    def decode(self, hiddens: Sequence[np.ndarray] | np.ndarray, mask: Any = None, **how: Any) -> list[str]:
        """The sequence that each record's hidden states decode to.

        hiddens: N of (L, D) as `hiddens` gives them, or (N, L, D) with mask (N, L), True where a token is.
        how: fields of `generate.Decoding`, e.g. beams=5; none: greedy. Raises ValueError where there is no decoder.
        """
        if mask is not None:
            hiddens = [h[np.asarray(m, dtype=bool)] for h, m in zip(hiddens, mask, strict=True)]
        width = self.config.hidden_size
        for index, h in enumerate(hiddens):
            if np.ndim(h) != 2 or np.shape(h)[1] != width:
                raise ValueError(f"hidden states {index} have shape {np.shape(h)}, the model's are (tokens, {width})")
        return [self._text(found[0]) for found in self.generator.decode(list(hiddens), Decoding(**how))]

    def sample(self, sequences: Sequence[str], method: str = METHODS[0], **how: Any) -> list[list[str]]:
        """New sequences near each given one. method: one of `sampling.METHODS`; how: fields of `sampling.Sampling`,
        e.g. num_samples=10, scaled_radius=1.0, seed=0. Raises ValueError for what cannot work."""
        sampling = Sampling(method, **how)
        return [[self._text(h) for h in found] for found in self.explore(self.hiddens(sequences), sampling)]

    def interpolate(self, first: str, second: str, num_interpolations: int = 11, **how: Any) -> list[str]:
        """What the points between two sequences decode to, the ends left out. how: as in `decode`."""
        one, other = self.hiddens([first, second])
        return self.decode(interpolate(one, other, num_interpolations), **how)

    def explore(
        self, hiddens: Sequence[np.ndarray], sampling: Sampling, records: np.ndarray | None = None
    ) -> list[list[Hypothesis]]:
        """All that `sampling` makes of each record's hidden states. records: (N,) numbers that name their draws."""
        if problems := sampling.problems():
            raise ValueError("; ".join(problems))
        records = np.arange(len(hiddens)) if records is None else records
        rows = np.repeat(np.arange(len(hiddens)), sampling.copies)
        found = self.generator.decode(hiddens, sampling.decoding, rows, sampling.keys(records))
        a_copy = [one[: sampling.kept] for one in found]
        starts = range(0, len(rows), sampling.copies)
        return [[h for one in a_copy[i : i + sampling.copies] for h in one] for i in starts]

    @cached_property
    def generator(self) -> Generator:
        """The decoder's engine, on the same weights."""
        if not hasattr(self.module, "start"):
            raise ValueError(f"{self.spec.name} ({self.source}) has no decoder: it embeds, but generates nothing")
        return Generator(
            self.module,
            bos_id=self.tokenizer.bos_id,
            eos_id=self.tokenizer.eos_id,
            capacity=self.config.max_positions,
            device=self.encoder.device,
            precision=self.encoder.precision,
        )

    def _text(self, hypothesis: Hypothesis) -> str:
        return self.tokenizer.decode(hypothesis.ids)

    # ------------------------------------------------------------------------------------------- shared with bulk

    def check_pooling(self, pooling: str) -> None:
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown; there are: {', '.join(POOLINGS)}")
        if pooling == "cls" and not self.tokenizer.prefix:
            raise ValueError(f"pooling=cls: {self.spec.name} puts no token before a sequence; use mean or max")

    def layer_numbers(self, layers: Sequence[int]) -> tuple[int, ...]:
        """Layers counted from 0; negative ones count from the end, -1 = after the final norm."""
        last = self.config.num_layers
        for layer in layers:
            if not -(last + 1) <= layer <= last:
                raise ValueError(f"layers: {layer} is not one of 0 (embeddings) … {last} (after the final norm)")
        return tuple(layer % (last + 1) for layer in layers)

    def max_residues(self, max_length: int | None = None) -> int:
        """Residues that fit the encoder. max_length: tokens, specials included; None: what the model was made for."""
        limit: int = self.config.max_positions
        if max_length is None:
            max_length = limit
        elif self.config.positions_end and max_length > limit:
            raise ValueError(f"max_length={max_length}: {self.spec.name} has positions for {limit} tokens, no more")
        residues = max_length - self.tokenizer.num_specials
        if residues < 1:
            raise ValueError(f"max_length={max_length} leaves no room beside {self.tokenizer.num_specials} specials")
        return residues

    def run(
        self,
        sequences: Sequence[bytes],
        wanted: Wanted,
        *,
        long: str = "error",
        max_length: int | None = None,
        overlap: int | None = None,
    ) -> Encoded:
        """Tokenize cleaned sequences, cut what is too long, encode, join: results a sequence.

        Raises ValueError for a sequence that is empty or, where long="error", too long.
        """
        if long not in POLICIES:
            raise ValueError(f"long={long!r} is unknown; there are: {', '.join(POLICIES)}")
        limit = self.max_residues(max_length)
        overlap = default_overlap(limit) if overlap is None else overlap
        pieces, keep, owners = self._pieces(sequences, long, limit, overlap)
        encoded = self.encoder.encode(pieces, wanted, keep)
        kept = keep[:, 1] - keep[:, 0]
        return Encoded(
            {layer: merge(x, kept, owners, str(wanted.pooling)) for layer, x in encoded.pooled.items()},
            {layer: stitch(x, owners) for layer, x in encoded.hiddens.items()},
            stitch(encoded.logits, owners) if wanted.logits else [],
        )

    def _cleaned(self, sequences: Sequence[str]) -> list[bytes]:
        if isinstance(sequences, str):
            raise ValueError("a list of sequences is wanted, not one string: [sequence]")
        sequences = list(sequences)
        for index, sequence in enumerate(sequences):
            if not isinstance(sequence, str):
                raise ValueError(f"sequence {index} is {sequence!r:.40}, a {type(sequence).__name__}: give a str")
            if problem := self.tokenizer.foreign([sequence.encode()]):
                raise ValueError(f"sequence {index} ({sequence[:40]}): {problem}")
        results = [self.tokenizer.clean(sequence.encode()) for sequence in sequences]
        if letters := sum((counts for _, counts in results), Counter()):
            log.warning("odd letters, by the rule of moltron.tokenizers: %s", dict(letters))
        return [sequence for sequence, _ in results]

    def _pieces(
        self, sequences: Sequence[bytes], long: str, limit: int, overlap: int
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Ids of P pieces with their specials, (P, 2) the rows to keep of each, (P,) the sequence each belongs to."""
        prefix, suffix = (np.array(ids, dtype=np.int64) for ids in (self.tokenizer.prefix, self.tokenizer.suffix))
        pieces, keep, owners = [], [], []
        for index, sequence in enumerate(sequences):
            ids = self.tokenizer.encode(sequence)
            ids = ids[len(prefix) : len(ids) - len(suffix)]
            if len(ids) == 0:
                raise ValueError(f"sequence {index} is empty")
            if len(ids) > limit and long == "error":
                raise ValueError(
                    f"sequence {index} has {len(ids)} residues, the limit is {limit}: long='truncate' keeps these, "
                    "long='window' reads all in overlapping windows"
                )
            ids = ids if long == "window" else ids[:limit]
            for begin, end, keep_from, keep_to in cut(len(ids), limit, overlap if long == "window" else 0).tolist():
                pieces.append(np.concatenate([prefix, ids[begin:end], suffix]))
                keep.append((len(prefix) + keep_from - begin, len(prefix) + keep_to - begin))
                owners.append(index)
        return pieces, np.array(keep, dtype=np.int64).reshape(-1, 2), np.array(owners, dtype=np.int64)
