"""How ESM-1 is cut: globs over module names."""

from moltron.models.encoder import encoder_plan

PLAN = encoder_plan("embed_positions", "embed_norm")
