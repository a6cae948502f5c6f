"""What every tokenizer offers: text to codes to ids, and back. The alphabets are residues.py and smiles.py.

    text ──clean──> bytes ──codes──> one byte a token ──table──> ids ──prefix, suffix──> encoder input
                                     (a store keeps these)

Knows nothing of files, batches and models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable

import numpy as np


class Tokenizer(ABC):
    """A vocabulary; `pieces[id]` is a token's text.

    name; alphabet: "protein" or "molecule"; pieces: list of str by id;
    prefix, suffix: ids that encode() puts around an encoder's input, num_specials of them in all;
    bos_id: what a decoder's input begins with; eos_id: what its labels end with; pad_id, unk_id;
    mask_id: None where the objective has sentinels instead: sentinel_ids, int64 in order of use, else empty;
    special_ids: frozenset, tokens that no text has; residue_ids: int64, the tokens a random one is drawn from;
    table: (256,), code -> id, `unk_id` where no token has the code.
    """

    name: str
    alphabet: str
    pieces: list[str]
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    bos_id: int
    eos_id: int
    pad_id: int
    unk_id: int
    mask_id: int | None
    sentinel_ids: np.ndarray
    special_ids: frozenset[int]
    residue_ids: np.ndarray
    table: np.ndarray

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    @property
    def num_specials(self) -> int:
        return len(self.prefix) + len(self.suffix)

    @abstractmethod
    def clean(self, sequence: bytes) -> tuple[bytes, Counter[str]]:
        """The alphabet's rule for odd letters. -> (sequence that codes() takes, what was changed)."""

    @abstractmethod
    def codes(self, sequence: bytes) -> bytes:
        """One byte a token, to be looked up in `table`."""

    @abstractmethod
    def count_unknown(self, sequence: bytes) -> tuple[int, int]:
        """How many letters (or tokens) of a sequence, as written, the alphabet lacks; how many there are."""

    def foreign(self, sequences: Iterable[bytes]) -> str | None:
        """Why these can hardly be of this alphabet; None: they may be. SMILES have 37 % letters that are no residues,
        proteins 75 % tokens that are no chemistry, and neither of its own one in a hundred."""
        found = list(map(self.count_unknown, sequences))
        unknown, count = map(sum, zip((0, 0), *found, strict=True))
        if 2 * sum(u > n / 4 for u, n in found) <= len(found):  # one odd record of few is one
            return None
        return f"{unknown / count:.0%} of the letters stand for nothing in a {self.alphabet}"

    def encode(self, sequence: str | bytes) -> np.ndarray:
        """-> (n,) int64: `prefix`, the ids of the tokens as written (clean() first), `suffix`."""
        letters = sequence.encode("ascii", "replace") if isinstance(sequence, str) else sequence
        codes = np.frombuffer(self.codes(letters), dtype=np.uint8)
        return np.concatenate([self.prefix, self.table[codes], self.suffix], dtype=np.int64, casting="unsafe")

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without begin, end and padding; other specials as their names."""
        silent = (self.bos_id, self.eos_id, self.pad_id)
        return "".join(self.pieces[index] for index in map(int, ids) if index not in silent)
