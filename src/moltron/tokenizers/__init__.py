"""Text to ids and back. Knows nothing of files, batches and models."""

from moltron.tokenizers.residues import ResidueTokenizer, clean, get_tokenizer

__all__ = ["ResidueTokenizer", "clean", "get_tokenizer"]
