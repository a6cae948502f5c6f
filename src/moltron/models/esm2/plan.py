"""How ESM-2 is cut: globs over module names."""

from moltron.models.spec import ParallelPlan

PLAN = ParallelPlan(units=("layers.*",))
