"""How MegaMolBART is cut: globs over module names."""

from moltron.models.spec import ParallelPlan

PLAN = ParallelPlan(units=("encoder.layers.*", "decoder.layers.*"), methods=("encode", "start", "step"))
