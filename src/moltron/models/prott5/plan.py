"""How ProtT5 is cut: globs over module names."""

from moltron.models.encoder_decoder import STAGES, TENSOR
from moltron.models.spec import ParallelPlan

UNITS = ("encoder.layers.*", "decoder.layers.*")
CONTEXT = ("encoder.layers.0", "encoder.norm")
PLAN = ParallelPlan(
    units=UNITS, methods=("encode", "start", "step"), tensor=TENSOR, context=CONTEXT, stages=(*STAGES, "embed")
)
