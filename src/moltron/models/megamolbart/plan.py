"""How MegaMolBART is cut: globs over module names."""

from moltron.models.encoder_decoder import PLAN

__all__ = ["PLAN"]
