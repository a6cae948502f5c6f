"""How ProtT5 is cut: globs over module names."""

from moltron.models.encoder_decoder import STAGES, TENSOR
from moltron.models.spec import ParallelPlan

UNITS = ("encoder.layers.*", "decoder.layers.*")
COMPILED = ("encoder.norm", "decoder.norm", "head")
CONTEXT = ("encoder.layers.0", "encoder.norm")
METHODS = ("encode", "start", "step")
HEADS = {"encoder.relative_bias": "column of whole", "decoder.relative_bias": "column of whole"}
COPIED = {
    "embed": "head",
    "encoder.relative_bias": "encoder.layers.*",
    "decoder.relative_bias": "decoder.layers.*",
}
PLAN = ParallelPlan(
    units=UNITS,
    compiled=COMPILED,
    methods=METHODS,
    tensor=TENSOR | HEADS,
    context=CONTEXT,
    stages=STAGES,
    copied=COPIED,
)
