"""How ProtT5 is cut: globs over module names."""

from moltron.models.encoder_decoder import TENSOR
from moltron.models.spec import ParallelPlan

UNITS = ("encoder.layers.*", "decoder.layers.*")
COMPILED = ("encoder.norm", "decoder.norm", "head")
CONTEXT = ("encoder.layers.0", "encoder.norm")
PLAN = ParallelPlan(units=UNITS, compiled=COMPILED, methods=("encode", "start", "step"), tensor=TENSOR, context=CONTEXT)
