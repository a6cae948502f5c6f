"""How MegaMolBART is cut: globs over module names."""

from moltron.models.encoder_decoder import STAGES, TENSOR
from moltron.models.spec import ParallelPlan

UNITS = ("encoder.layers.*", "decoder.layers.*")
COMPILED = ("encoder.norm", "decoder.norm", "head")
CONTEXT = ("encoder.layers.0", "encoder.norm")
METHODS = ("encode", "start", "step")
PLAN = ParallelPlan(units=UNITS, compiled=COMPILED, methods=METHODS, tensor=TENSOR, context=CONTEXT, stages=STAGES)
