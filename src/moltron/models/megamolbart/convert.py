"""MegaMolBART elsewhere: there is no layout that holds the same model, ours alone is read and written.

`transformers`' BART is post-norm; Chemformer's and MolBART's checkpoints scale the embedding by √D, have sinusoidal
positions, erf GELU and a head with a bias (docs/models.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor

from moltron.models.weightmap import Conversion


def refuse(config: Any, tensors: Mapping[str, Tensor]) -> NoReturn:
    raise ValueError("transformers has no MegaMolBART (its BART is post-norm): use format=moltron")


CONVERSION = Conversion(write_hf=refuse)
