"""ESM-2."""

from moltron.models.esm2.convert import CONVERSION
from moltron.models.esm2.model import Esm2, Esm2Config
from moltron.models.esm2.plan import PLAN
from moltron.models.spec import ModelSpec

SPEC = ModelSpec(name="esm2", config=Esm2Config, model=Esm2, plan=PLAN, objectives=("masked_lm",), convert=CONVERSION)
