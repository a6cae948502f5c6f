"""Text to ids and back. Knows nothing of files, batches and models."""

from moltron.tokenizers.residues import ResidueTokenizer, clean, get_tokenizer
from moltron.tokenizers.smiles import SmilesTokenizer
from moltron.tokenizers.tokenizer import Tokenizer

__all__ = ["ResidueTokenizer", "SmilesTokenizer", "Tokenizer", "clean", "get_tokenizer"]
