"""Protein sequences to ids and back: one byte, one token, by a table of 256 entries.

    "mkta yia*" ──clean──> b"MKTAYIA" ──encode──> [<cls> M K T A Y I A <eos>]

Knows nothing of files, batches and models. Vocabularies: specification models.md §3, ids exact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache

import numpy as np

from moltron.tokenizers.smiles import SmilesTokenizer
from moltron.tokenizers.tokenizer import Tokenizer

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


class ResidueTokenizer(Tokenizer):
    """One-letter residues among specials with longer names; a code is the ASCII letter.

    residue_ids: (20,) the standard amino acids; bos_id: also the first token of an encoder's input, where there is one.
    """

    alphabet = "protein"

    def __init__(
        self, name: str, pieces: Iterable[str], bos: str, eos: str, *, mask: str | None = None, ends: str = "none"
    ) -> None:
        """ends: which of bos and eos encode() adds: both | eos | none."""
        self.name = name
        self.pieces = list(pieces)
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.pad_id, self.unk_id = ids["<pad>"], ids["<unk>"]
        self.mask_id = None if mask is None else ids[mask]
        self.bos_id, self.eos_id = ids[bos], ids[eos]
        self.prefix = (self.bos_id,) if ends == "both" else ()
        self.suffix = () if ends == "none" else (self.eos_id,)
        sentinels = [ids[f"<extra_id_{i}>"] for i in range(sum("extra_id" in piece for piece in ids))]
        self.sentinel_ids = np.array(sentinels, dtype=np.int64)
        self.special_ids = frozenset(index for piece, index in ids.items() if len(piece) > 1)
        self.residue_ids = np.array([ids[chr(letter)] for letter in STANDARD], dtype=np.int64)
        self.table = np.full(256, self.unk_id, dtype=np.uint8)
        for piece, index in ids.items():
            if len(piece) == 1:
                self.table[ord(piece)] = index

    def clean(self, sequence: bytes) -> tuple[bytes, Counter[str]]:
        return clean(sequence)

    def codes(self, sequence: bytes) -> bytes:
        return sequence

    def count_unknown(self, sequence: bytes) -> tuple[int, int]:
        return clean(sequence)[1]["unknown"], len(sequence)


_ESM1NV = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", *"LASGVERTDIPKNFQYHMCWXBZUO")


@cache
def get_tokenizer(name: str) -> Tokenizer:
    """ "esm2": ESM-2 and ESM-1b, 33 ids; "esm1nv": ESM-1nv, 30 ids, `<s>` and `</s>` in the roles of cls and eos;
    "prott5nv": the same 30, two specials and 96 sentinels; "prott5": ProtT5-XL, 128 ids; "megamolbart": 523 ids.
    """
    if name == "esm2":
        pieces = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
        return ResidueTokenizer(name, pieces, "<cls>", "<eos>", mask="<mask>", ends="both")
    if name == "esm1nv":
        return ResidueTokenizer(name, _ESM1NV, "<s>", "</s>", mask="<mask>", ends="both")
    if name == "prott5nv":
        pieces = [*_ESM1NV, "<cls>", "<sep>", *(f"<extra_id_{i}>" for i in range(96))]
        return ResidueTokenizer(name, pieces, "<s>", "</s>")
    if name == "prott5":
        pieces = ["<pad>", "</s>", "<unk>", *"ALGVSREDTIPKFQNYMHWCXBOUZ", *(f"<extra_id_{99 - i}>" for i in range(100))]
        tokenizer = ResidueTokenizer(name, pieces, "<pad>", "</s>", ends="eos")
        tokenizer.table[list(b"BOUZ")] = tokenizer.table[ord("X")]  # ProtT5-XL was trained on text with X for these
        return tokenizer
    if name == "megamolbart":
        return SmilesTokenizer()
    raise ValueError(f"no tokenizer {name!r}: choose esm2, esm1nv, prott5nv, prott5 or megamolbart")
