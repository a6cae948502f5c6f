"""Protein sequences to ids and back: one byte, one token, by a table of 256 entries.

    "mkta yia*" ──clean──> b"MKTAYIA" ──encode──> [<cls> M K T A Y I A <eos>]

Knows nothing of files, batches and models. Vocabularies: specification models.md §3, ids exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

import numpy as np

STANDARD = b"ACDEFGHIKLMNPQRSTVWY"  # the 20 amino acids of the genetic code
LEGAL = STANDARD + b"XBUZO"  # what clean() lets through

_LOWER = b"abcdefghijklmnopqrstuvwxyz"
_SPACE = b" \t\r\n\v\f"
_GAPS = b"-."
_TO_X = bytes(code if code in LEGAL else ord("X") for code in range(256))


def clean(sequence: bytes) -> tuple[bytes, Counter[str]]:
    """The one rule for odd letters, everywhere in moltron. -> (sequence of LEGAL letters only, what was changed).

    In this order, each counted in letters under the name in brackets:
      1. a character outside ASCII counts as one unknown letter, however many bytes it has;
      2. white space is removed (`white_space`); so are the gaps `-` and `.` (`gap`): ESM-2's vocabulary has them, but
         they pad an alignment, they are not residues, and a sequence must not depend on whether it was aligned;
      3. lower case becomes upper case (`lower_case`): soft masking, not another residue;
      4. `*` at the end is removed (`final_stop`): the stop codon; a `*` further in becomes X (`inner_stop`);
      5. `J` (leucine or isoleucine) becomes X (`J`);
      6. anything else that is not one of LEGAL, e.g. a digit, becomes X (`unknown`).
    X, B, U, Z and O are kept. A caller that refuses unknown letters looks at the count of `unknown`.
    """
    if not sequence.translate(None, LEGAL):
        return sequence, Counter()
    if not sequence.isascii():
        text = sequence.decode("utf-8", "replace")
        sequence = "".join(" " if letter.isspace() else letter for letter in text).encode("ascii", "replace")
    counts: Counter[str] = Counter()

    def delete(letters: bytes, name: str) -> bytes:
        shorter = sequence.translate(None, letters)
        counts[name] = len(sequence) - len(shorter)
        return shorter

    sequence = delete(_SPACE, "white_space")
    sequence = delete(_GAPS, "gap")
    upper = sequence.upper()
    counts["lower_case"] = len(sequence) - len(sequence.translate(None, _LOWER))
    sequence = upper.rstrip(b"*")
    counts["final_stop"] = len(upper) - len(sequence)
    counts["inner_stop"] = sequence.count(b"*")
    counts["J"] = sequence.count(b"J")
    counts["unknown"] = len(sequence.translate(None, LEGAL)) - counts["inner_stop"] - counts["J"]
    return sequence.translate(_TO_X), +counts


class ResidueTokenizer:
    """A vocabulary of specials and one-letter residues; `pieces[id]` is a token's text.

    pieces: list of str by id; table: (256,) uint8, byte -> id, `<unk>` where the vocabulary has no such letter;
    special_ids: frozenset; residue_ids: (20,) the standard amino acids; num_specials: tokens added to a sequence.
    """

    num_specials = 2

    def __init__(self, name: str, pieces: Iterable[str], cls: str, eos: str) -> None:
        self.name = name
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.pad_id, self.mask_id, self.unk_id = ids["<pad>"], ids["<mask>"], ids["<unk>"]
        self.cls_id, self.eos_id = ids[cls], ids[eos]
        self.special_ids = frozenset(index for piece, index in ids.items() if len(piece) > 1)
        self.residue_ids = np.array([ids[chr(letter)] for letter in STANDARD], dtype=np.int64)
        self.table = np.full(256, self.unk_id, dtype=np.uint8)
        for piece, index in ids.items():
            if len(piece) == 1:
                self.table[ord(piece)] = index

    def encode(self, sequence: str | bytes) -> np.ndarray:
        """-> (L + 2,) int64: `<cls>`, one id a letter as written (clean() first), `<eos>`."""
        letters = sequence.encode("ascii", "replace") if isinstance(sequence, str) else sequence
        ids = np.empty(len(letters) + 2, dtype=np.int64)
        ids[0], ids[-1] = self.cls_id, self.eos_id
        ids[1:-1] = self.table[np.frombuffer(letters, dtype=np.uint8)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without `<cls>`, `<eos>` and `<pad>`; other specials as their names."""
        silent = (self.cls_id, self.eos_id, self.pad_id)
        return "".join(self.pieces[index] for index in map(int, ids) if index not in silent)


@cache
def get_tokenizer(name: str) -> ResidueTokenizer:
    """ "esm2": ESM-2 and ESM-1b, 33 ids; "esm1nv": ESM-1nv, 30 ids, `<s>` and `</s>` in the roles of cls and eos."""
    if name == "esm2":
        pieces = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
        return ResidueTokenizer(name, pieces, cls="<cls>", eos="<eos>")
    if name == "esm1nv":
        pieces = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *"LASGVERTDIPKNFQYHMCWXBZUO"]
        return ResidueTokenizer(name, pieces, cls="<s>", eos="</s>")
    raise ValueError(f"no tokenizer {name!r}: choose esm2 or esm1nv")
