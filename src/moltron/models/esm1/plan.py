"""How ESM-1 is cut: globs over module names."""

from moltron.models.spec import ParallelPlan

PLAN = ParallelPlan(units=("layers.*",))
