"""SMILES to ids and back: a regular expression finds the tokens, MegaMolBART's vocabulary numbers them.

    "C[nH]Br" ──codes──> one byte a token ──table──> [272 286 283]

The 251 tokens of chemistry and the unknown one fit into a byte, so a store keeps molecules as bytes too, and a batch is
a gather through a table, as of residues. Knows nothing of molecules: what is no SMILES has tokens as well.

Vocabulary and expression: specification models.md §3; they are those of MolBART / Chemformer (Irwin et al. 2022,
github.com/MolecularAI/Chemformer, bart_vocab.txt, Apache-2.0), where `[C@H]` and 33 more stand that the spec left out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise

import numpy as np

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

_TOKEN = re.compile(
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\\\|\/|:|~|@|\?|>|\*|\$|\%[0-9]{2}|[0-9]|.",
    re.DOTALL,
)


def _ranges(bounds: list[str]) -> list[str]:
    """Names of the intervals between neighbours in a list that rises or falls."""
    pairs = [sorted(pair, key=float) for pair in pairwise(bounds)]
    return [f"LogD_change_({low}, {high}]" for low, high in pairs]


def pieces() -> list[str]:
    """All 523, by id."""
    tenths = [f"{i / 10:.1f}" for i in range(-57, 60, 2)]  # -5.7 … 5.9
    middle = tenths.index("-0.1")
    changes = _ranges([*tenths[middle:], "inf"]) + _ranges([*tenths[middle::-1], "-inf"])
    properties = ["low->high", "high->low", "no_change"]
    return [
        *("<PAD>", "?", "^", "&", "<MASK>", "<SEP>"),
        *changes,
        *(f"{name}_{change}" for name in ("Solubility", "Clint") for change in properties),
        *(f"<UNUSED_{i}>" for i in range(200)),
        *_CHEMISTRY,
    ]


class SmilesTokenizer:
    """MegaMolBART's. Attributes as `ResidueTokenizer`'s; a code is a token's number among those of chemistry."""

    name, alphabet = "megamolbart", "molecule"
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    num_specials = 0
    cls_id = None

    def __init__(self) -> None:
        self.pieces = pieces()
        self.vocab_size = len(self.pieces)
        ids = {piece: index for index, piece in enumerate(self.pieces)}
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = (
            ids[p] for p in ("<PAD>", "?", "^", "&", "<MASK>")
        )
        first = ids[_CHEMISTRY[0]]
        self.special_ids = frozenset(range(first))
        self.sentinel_ids = np.zeros(0, dtype=np.int64)
        self.unk_code = len(_CHEMISTRY)
        self.table = np.full(256, self.unk_id, dtype=np.uint16)
        self.table[: self.unk_code] = np.arange(first, self.vocab_size)
        self._codes = {token: code for code, token in enumerate(_CHEMISTRY)}

    @staticmethod
    def clean(smiles: bytes) -> tuple[bytes, Counter[str]]:
        """-> (without white space around it, what was changed: nothing that counts)."""
        return smiles.strip(), Counter()

    def codes(self, smiles: bytes) -> bytes:
        """One byte a token; `unk_code` for a token that the vocabulary does not have."""
        found = _TOKEN.findall(smiles.decode("utf-8", "replace"))
        return bytes([self._codes.get(token, self.unk_code) for token in found])

    def encode(self, smiles: str | bytes) -> np.ndarray:
        """-> (L,) int64, one id a token."""
        written = smiles.encode() if isinstance(smiles, str) else smiles
        return self.table[np.frombuffer(self.codes(written), dtype=np.uint8)].astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without beginning, end and padding."""
        silent = (self.bos_id, self.eos_id, self.pad_id)
        return "".join(self.pieces[index] for index in map(int, ids) if index not in silent)


@cache
def smiles_tokenizer() -> SmilesTokenizer:
    return SmilesTokenizer()
