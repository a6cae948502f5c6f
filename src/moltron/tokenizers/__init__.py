"""Text to ids and back. Knows nothing of files, batches and models."""

from moltron.tokenizers.residues import ResidueTokenizer, clean, residue_tokenizer
from moltron.tokenizers.smiles import SmilesTokenizer, smiles_tokenizer

Tokenizer = ResidueTokenizer | SmilesTokenizer
NAMES = ("esm2", "esm1nv", "prott5nv", "prott5", "megamolbart")

__all__ = ["NAMES", "ResidueTokenizer", "SmilesTokenizer", "Tokenizer", "clean", "get_tokenizer"]


def get_tokenizer(name: str) -> Tokenizer:
    """One of NAMES. Raises ValueError for another."""
    found = smiles_tokenizer() if name == "megamolbart" else residue_tokenizer(name)
    if found is None:
        raise ValueError(f"no tokenizer {name!r}: choose {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    return found
