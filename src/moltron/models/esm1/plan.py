"""How ESM-1 is cut: globs over module names."""

from moltron.models.spec import ParallelPlan, block_plan

TENSOR = {
    "embed": "replicate",
    "embed_positions": "replicate",
    "embed_norm": "replicate",
    "layers.0": "scatter tokens",
    **block_plan("layers.*"),
    "norm": "norm, gather tokens",
    "head": "replicate",
}
STAGES = ("embed", "embed_positions", "embed_norm", "layers.*", "norm", "head", "contact_head")
PLAN = ParallelPlan(units=("layers.*",), tensor=TENSOR, stages=STAGES, copied={"embed": "head"})
