"""MegaMolBART."""

from moltron.models.megamolbart.convert import CONVERSION
from moltron.models.megamolbart.model import MegaMolBart, MegaMolBartConfig
from moltron.models.megamolbart.plan import PLAN
from moltron.models.spec import ModelSpec

SPEC = ModelSpec(
    name="megamolbart",
    config=MegaMolBartConfig,
    model=MegaMolBart,
    plan=PLAN,
    objectives=("denoising",),
    convert=CONVERSION,
)
