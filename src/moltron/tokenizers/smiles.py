"""SMILES to ids and back: MegaMolBART's regular expression and its 523 tokens.

    b"C[C@H](N)Br" ──split──> C [C@H] ( N ) Br ──codes──> one byte a token ──table──> ids 272 … 522, or 1 for `?`

The vocabulary is MolBART's `bart_vocab.txt` (https://github.com/MolecularAI/Chemformer, Apache-2.0), token by token.
Knows nothing of chemistry: data/prepare does.
"""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from moltron.tokenizers.tokenizer import Tokenizer

# The published expression wrapped as `(…|.)`, without the alternatives of one character, which the last `.` takes just
# as well: twice as fast, and the tests compare the two.
_TOKEN = re.compile(rb"\[[^\]]+]|Br?|Cl?|%[0-9]{2}|.")
_CHEMISTRY = r"""
    C c 1 ( - 2 s N = ) n Br 3 O [nH] [C@H] / \ [C@@H] [C@] o 4 [C@@] 5 6 7 [n+] . [Br-] S I F Cl [O-] # P [Na+]
    [N+] [Cl-] 8 [Si] [N-] [18F] 9 [I-] B [S+] [2H] [P+] [125I] %10 %11 [n-] [B-] [O] [o+] [N@@+] [N@+] [PH] [se]
    [Se] [s+] [Li+] [P@] [P@@] [3H] [K+] [OH-] [te+] [se+] [Te] [S@+] [BH2-] [11CH3] [11C] [Cl+3] [N@@] [S-] [C+]
    [P@+] [C-] [Zn+2] [Ca+2] [Mg+2] [SeH] [BH-] [SH2] [TeH2] [SiH4] [N@] [14CH2] [Ag] [S@@+] [I+] [MgH2] [125IH]
    [Se+] [As] [SiH2] [Ra] [IH2] [P-] [Na] [NH-] [Cs] [Zn] [Li] [As+] [te] [131I] [Ag+] p [Al-3] [Rb+] [13CH] [11CH]
    [11CH2] [14c] [14C@@] [127I] [Mg] [14C] [123I] [124I] [F-] [14CH3] [135I] %12 [NH+] [76Br] [32PH] [35S] b [73Se]
    [11C@@H] [Se-] [c+] [14C@H] [18OH] [SH] [S@@] [Cs+] [He] [O+] [nH+] [NH2+] [32P] [Zn+] [BH3-] [I+3] [Si-] [SH+]
    [19F] [Br+2] [I+2] [Al+3] [123I-] [131I-] [127Xe] [133Xe] [89Sr+2] [N] [82Rb+] [75Se] [Rb] [81Kr] [18F-] [13NH3]
    [K] [Cl+2] [Zn-2] [SeH2] [AsH3] [Kr] [Xe] [S@] [cH-] [NH4+] [Al] [Si@] [15n] [SH-] [SiH] [11c] [OH] [c-] [18FH]
    [123IH] [13c] [13cH] [14cH] [Cl+] [Sr+2] [CH-] [Bi] [B] [Ba+2] [Bi+3] [SiH-] [b-] [H+] [13C] [OH+] [14CH] [15nH]
    [CaH2] [LiH] [C] [Ca] [42K+] [123Te] [S-2] [223Ra+2] [S] [Ra+2] [22Na+] [125I-] [85Sr+2] [PH2] [SrH2] [15OH2]
    [47Ca+2] [85SrH2] [45Ca+2] [B@@-] [B@-] [17F] [PH2+] [11C-] [Mg+] [NaH] [P@@+] [SiH3-] [P-3] [KH] [Be+2] [NH3+]
    [Ag-4] [18O] [14C@@H] [CH] [CH2] [O-2] [124I-] [As-] [Ba] [223Ra] [82Rb] [76BrH] [AsH] [131Cs]
""".split()  # noqa: SIM905
_STEPS = [f"({a / 10:.1f}, {(a + 2) / 10:.1f}]" for a in range(-1, 59, 2)]
_FALLS = [f"({a / 10:.1f}, {(a + 2) / 10:.1f}]" for a in range(-3, -59, -2)]
_CHANGES = ("low->high", "high->low", "no_change")


class _Codes(dict[bytes, int]):
    """Token -> code; 0, which is `?`, for one that the vocabulary lacks."""

    def __missing__(self, token: bytes) -> int:
        return 0


class SmilesTokenizer(Tokenizer):
    """A code is 0 for `?`, the unknown token, and 1 … 251 for a chemistry token, in the vocabulary's order.

    What SMILES cannot hold (`^`, `&`, `<MASK>`, the property tokens) is never read from text: it becomes `?`.
    """

    name, alphabet = "megamolbart", "molecule"
    pad_id, unk_id, bos_id, eos_id, mask_id = range(5)

    def __init__(self) -> None:
        self.pieces = [
            *("<PAD>", "?", "^", "&", "<MASK>", "<SEP>"),
            *(f"LogD_change_{step}" for step in (*_STEPS, "(5.9, inf]", *_FALLS, "(-inf, -5.7]")),
            *(f"{name}_{change}" for name in ("Solubility", "Clint") for change in _CHANGES),
            *(f"<UNUSED_{index}>" for index in range(200)),
            *_CHEMISTRY,
        ]
        first = len(self.pieces) - len(_CHEMISTRY)
        self.sentinel_ids = np.zeros(0, dtype=np.int64)
        self.special_ids = frozenset(range(first))
        self.residue_ids = np.arange(first, len(self.pieces))
        self.table = np.full(256, self.unk_id, dtype=np.uint16)
        self.table[1 : len(_CHEMISTRY) + 1] = self.residue_ids
        self._codes = _Codes((token.encode(), code) for code, token in enumerate(_CHEMISTRY, 1))

    def clean(self, sequence: bytes) -> tuple[bytes, Counter[str]]:
        """Without white space; the molecule is taken as it is written. -> (SMILES, {"white_space": characters})."""
        shorter = b"".join(sequence.split())
        return shorter, +Counter(white_space=len(sequence) - len(shorter))

    def codes(self, sequence: bytes) -> bytes:
        """One byte a token, `?` (0) for those outside the vocabulary."""
        return bytes(map(self._codes.__getitem__, _TOKEN.findall(sequence)))

    def count_unknown(self, sequence: bytes) -> tuple[int, int]:
        codes = self.codes(self.clean(sequence)[0])
        return codes.count(0), len(codes)
