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

    pieces: list of str by id; table: (256,) uint8, code -> id, `<unk>` where the vocabulary has no such letter.
    prefix, suffix: ids around a sequence; num_specials: how many these are; cls_id: the one before it, if there is one.
    bos_id, eos_id: before what a decoder reads, after what it writes. sentinel_ids: in the order spans take them.
    special_ids: frozenset; residue_ids: (20,) the standard amino acids; mask_id is None where nothing is masked.
    """

    alphabet = "protein"
    clean = staticmethod(clean)

    def __init__(
        self,
        name: str,
        pieces: Iterable[str],
        *,
        prefix: tuple[str, ...],
        suffix: tuple[str, ...],
        bos: str,
        eos: str,
        read_as_x: bytes = b"",
    ) -> None:
        """read_as_x: letters with pieces of their own whose id `X` stands for."""
        self.name = name
        self.pieces = list(pieces)
        self.vocab_size = len(self.pieces)
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.pad_id, self.unk_id, self.mask_id = ids["<pad>"], ids["<unk>"], ids.get("<mask>")
        self.prefix, self.suffix = (tuple(ids[piece] for piece in pieces) for pieces in (prefix, suffix))
        self.num_specials = len(prefix) + len(suffix)
        self.cls_id = self.prefix[0] if prefix else None
        self.bos_id, self.eos_id = ids[bos], ids[eos]
        numbers = range(sum(piece.startswith("<extra_id_") for piece in ids))
        self.sentinel_ids = np.array([ids[f"<extra_id_{i}>"] for i in numbers], dtype=np.int64)
        self.special_ids = frozenset(index for piece, index in ids.items() if len(piece) > 1)
        self.residue_ids = np.array([ids[chr(letter)] for letter in STANDARD], dtype=np.int64)
        self.table = np.full(256, self.unk_id, dtype=np.uint8)
        for piece, index in ids.items():
            if len(piece) == 1:
                self.table[ord(piece)] = ids["X"] if ord(piece) in read_as_x else index

    def codes(self, sequence: bytes) -> bytes:
        """One byte a token, what `table` turns into ids: here the letters themselves."""
        return sequence

    def encode(self, sequence: str | bytes) -> np.ndarray:
        """-> (L + num_specials,) int64: prefix, one id a letter as written (clean() first), suffix."""
        letters = sequence.encode("ascii", "replace") if isinstance(sequence, str) else sequence
        ids = self.table[np.frombuffer(letters, dtype=np.uint8)]
        return np.concatenate([self.prefix, ids, self.suffix]).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the specials at the ends; other specials as their names."""
        silent = (*self.prefix, *self.suffix, self.bos_id, self.eos_id, self.pad_id)
        return "".join(self.pieces[index] for index in map(int, ids) if index not in silent)


@cache
def residue_tokenizer(name: str) -> ResidueTokenizer | None:
    """esm2: ESM-2 and ESM-1b, 33 ids; esm1nv, 30 ids, `<s>` and `</s>` in the roles of cls and eos; prott5nv: the same
    pieces and sentinels, 128 ids; prott5: Rostlab's ProtT5-XL, 128 ids. None: there is none of that name."""
    sentinels = [f"<extra_id_{i}>" for i in range(100)]
    nv = ["<unk>", "<s>", "</s>", "<pad>", "<mask>", *"LASGVERTDIPKNFQYHMCWXBZUO"]
    if name == "esm2":
        pieces = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
        return ResidueTokenizer(name, pieces, prefix=("<cls>",), suffix=("<eos>",), bos="<cls>", eos="<eos>")
    if name == "esm1nv":
        return ResidueTokenizer(name, nv, prefix=("<s>",), suffix=("</s>",), bos="<s>", eos="</s>")
    if name == "prott5nv":
        pieces = [*nv, "<cls>", "<sep>", *sentinels[:96]]
        return ResidueTokenizer(name, pieces, prefix=(), suffix=(), bos="<s>", eos="</s>")
    if name == "prott5":
        pieces = ["<pad>", "</s>", "<unk>", *"ALGVSREDTIPKFQNYMHWCXBOUZ", *reversed(sentinels)]
        ends = dict(prefix=(), suffix=("</s>",), bos="<pad>", eos="</s>")
        return ResidueTokenizer(name, pieces, **ends, read_as_x=b"UZOB")  # as it was trained
    return None
