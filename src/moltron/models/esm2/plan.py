"""How ESM-2 is cut: globs over module names."""

from moltron.models.spec import ParallelPlan, block_plan

TENSOR = {
    "embed": "replicate",
    "layers.0": "scatter tokens",
    **block_plan("layers.*"),
    "norm": "norm, gather tokens",
    "head": "replicate",
}
STAGES = ("embed", "layers.*", "norm", "head", "contact_head")
PLAN = ParallelPlan(units=("layers.*",), tensor=TENSOR, stages=STAGES, copied={"embed": "head"})
