"""SMILES to RDKit's canonical SMILES. Knows nothing of files."""

from __future__ import annotations


class Canonicalizer:
    """Call it with a SMILES as bytes -> (canonical SMILES, None) or (b"", reason). Raises: ValueError without RDKit."""

    def __init__(self) -> None:
        try:
            from rdkit import Chem, rdBase
        except ImportError as error:
            raise ValueError("kind=molecule needs RDKit: pip install 'moltron[molecules]'") from error
        self._chem = Chem
        rdBase.DisableLog("rdApp.*")  # its messages have no line numbers; ours do

    def __call__(self, smiles: bytes) -> tuple[bytes, str | None]:
        molecule = self._chem.MolFromSmiles(smiles.decode("ascii", "replace").strip())
        if molecule is None:
            return b"", "RDKit cannot read this SMILES"
        if not molecule.GetNumAtoms():
            return b"", "a molecule without atoms"
        return self._chem.MolToSmiles(molecule).encode(), None
